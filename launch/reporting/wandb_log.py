"""Weights & Biases, where `wandb.project` is set. It never ends a run, nor gets a key from us."""

import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from launch.config import TrainConfig, dump_yaml

# An unreachable server may cost a run 20 s. W&B's own look at the login takes 5 s of them, and its
# service a few more to start on a busy CPU.
INIT_TIMEOUT_SECONDS = 10
# Rows that could not be uploaded by then stay in the run folder, for `wandb sync`.
FINISH_TIMEOUT_SECONDS = 60


def _warn(reason: str) -> None:
    print(f"warning: no W&B: {reason}; the run goes on", file=sys.stderr, flush=True)


class WandbLog:
    """A started W&B run. The first failure to log is told, and ends the logging, not the run."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        """Start the run.

        Raises:
            wandb.Error, OSError: it couldn't start within `INIT_TIMEOUT_SECONDS`.
        """
        import wandb

        self._errors = (wandb.Error, OSError)
        self._run = wandb.init(
            project=config.wandb.project,
            name=config.wandb.run_name or folder.name,
            dir=str(folder),
            config=yaml.safe_load(dump_yaml(config)),
            mode="offline" if config.wandb.offline else "online",
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_SECONDS,
                finish_timeout=FINISH_TIMEOUT_SECONDS,
                # W&B would wrap stdout and stderr, and break the progress bar.
                console="off",
                silent=True,
            ),
        )
        self._alive = True

    def log(self, values: Mapping[str, float], step: int) -> None:
        if not self._alive:
            return
        try:
            self._run.log(dict(values), step=step)
        except self._errors as error:
            self._alive = False
            _warn(f"logging failed at step {step} ({error})")

    def close(self) -> None:
        """Upload what is left, for `FINISH_TIMEOUT_SECONDS` at most."""
        try:
            self._run.finish()
        except self._errors as error:
            _warn(f"the last rows couldn't be uploaded ({error})")


def start_wandb(config: TrainConfig, run_dir: Path) -> WandbLog | None:
    """A W&B run as `config.wandb` asks for, or None, with one warning if it was asked for.

    Offline runs need no account. Online ones need `wandb login` or WANDB_API_KEY; nothing is asked
    for at the terminal, and an unreachable server costs less than 20 s.
    """
    if config.wandb.project is None:
        return None
    try:
        import wandb
    except ImportError:
        _warn("the package isn't installed (`pip install wandb`)")
        return None
    try:
        if not config.wandb.offline and not wandb.login(prompt=False, verify=False):
            _warn("not logged in; run `wandb login`, set WANDB_API_KEY, or use wandb.offline=true")
            return None
        return WandbLog(config, run_dir)
    except (wandb.Error, OSError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        _warn(f"{first_line} (wandb.offline=true writes files for `wandb sync` instead)")
        return None
