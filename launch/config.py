"""From a YAML file and `key.path=value` overrides to a checked `TrainConfig`, and back to YAML.

Order: defaults < file < command line. `read_config` collects every problem and still returns a
usable configuration, so that `launch.configuration.preflight` can add what it finds and a person
hears all of it at once.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from launch.configuration import yaml_input
from launch.configuration.keys import (
    KEYS,
    SECTIONS,
    describe_error,
    describe_keys,
    is_text,
    key_path,
)
from launch.configuration.schema import TrainConfig
from launch.errors import UserError

__all__ = [
    "DEFAULT_CONFIG",
    "REPO_ROOT",
    "ConfigReading",
    "TrainConfig",
    "describe_keys",
    "dump_yaml",
    "has_ttt",
    "load_config",
    "parse_command_line",
    "read_config",
    "resolve_run_dir",
    "utc_timestamp",
]

REPO_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = REPO_ROOT / "configs" / "demo.yaml"
TIME = "${time}"


@dataclass(frozen=True)
class ConfigReading:
    """What was read: `config` holds defaults in place of the keys in `bad_keys`."""

    config: TrainConfig
    problems: tuple[str, ...]
    bad_keys: frozenset[str]


def _without(data: dict[str, Any], names: Sequence[Any]) -> dict[str, Any]:
    """A copy of `data` without the key at `names`, or without the innermost key that exists."""
    head, rest = names[0], names[1:]
    inner = data.get(head)
    if rest and isinstance(inner, dict):
        return {**data, head: _without(inner, rest)}
    return {key: value for key, value in data.items() if key != head}


def _validate(
    data: dict[str, Any], overridden: Container[str]
) -> tuple[TrainConfig, dict[str, str]]:
    """Validate; what fails is told by key path and replaced by its default."""
    problems: dict[str, str] = {}
    while True:
        try:
            return TrainConfig.model_validate(data), problems
        except ValidationError as failure:
            for error in failure.errors(include_url=False):
                path = key_path(error["loc"])
                problems.setdefault(path, describe_error(error, path, overridden))
                if error["type"] == "missing":
                    data = yaml_input.merge(data, tuple(str(part) for part in error["loc"]), "")
                else:
                    # Of a key with several forms, pydantic adds each form's name.
                    names = path.split(".") if path in KEYS else error["loc"]
                    data = _without(data, names)


def _absolute(text: str) -> str:
    return str(Path(text).expanduser().absolute())


def _absolute_source(text: str) -> str:
    """Each path of `path:weight,path:weight` made absolute; the weights stay as they are."""
    parts = []
    for part in text.split(","):
        path, colon, weight = part.strip().rpartition(":")
        if colon and not Path(part.strip()).exists():
            parts.append(f"{_absolute(path)}:{weight}")
        else:
            parts.append(_absolute(part.strip()))
    return ",".join(parts)


def _absolute_if_local(text: str | None) -> str | None:
    """A hub id stays; a local file or folder becomes absolute."""
    if text is None or not Path(text).expanduser().exists():
        return text
    return _absolute(text)


def _absolute_paths(config: TrainConfig) -> TrainConfig:
    """Relative paths hold for the working directory of the start; a saved file must outlive it."""
    data, release = config.data, config.moshi_paths
    plots = config.ttt.inner_loop_plot_dir
    sources = {
        name: _absolute_source(value)
        for name in ("train_data", "eval_data")
        if (value := getattr(data, name))
    }
    cache = {"cache_dir": _absolute(data.cache_dir)} if data.cache_dir else {}
    files = {name: _absolute_if_local(value) for name, value in release.model_dump().items()}
    return config.model_copy(
        update={
            "run_dir": _absolute(config.run_dir) if config.run_dir else "",
            "data": data.model_copy(update=sources | cache),
            "moshi_paths": release.model_copy(update=files),
            "ttt": config.ttt.model_copy(
                update={"inner_loop_plot_dir": _absolute(plots) if plots else None}
            ),
        }
    )


def has_ttt(config: TrainConfig) -> bool:
    """Whether the configured model has TTT layers."""
    return config.ttt.enable and config.ttt.layers != "none"


def _nothing_to_train(config: TrainConfig) -> str | None:
    if config.full_finetuning or config.lora.enable or has_ttt(config):
        return None
    return (
        "nothing to train: full_finetuning is false, lora.enable is false and "
        f"ttt.enable is {str(config.ttt.enable).lower()} (ttt.layers: {config.ttt.layers}); "
        "set one of the three: full_finetuning: true, lora.enable: true, or ttt.enable: true"
    )


def _lora_problem(config: TrainConfig) -> str | None:
    if not config.lora.enable:
        return None
    if config.full_finetuning:
        return (
            "lora.enable: found true with full_finetuning: true; adapters are trained on frozen "
            "weights; set full_finetuning: false for LoRA, or lora.enable: false"
        )
    if config.lora.scaling == 0:
        return (
            "lora.scaling: found 0, with which adapters neither act nor learn; allowed: above 0 "
            "(2 is usual)"
        )
    return None


def _key_in_file(config: TrainConfig) -> str | None:
    if config.wandb.key is None:
        return None
    return (
        "wandb.key: a key in a configuration leaks into copies and run folders; allowed: null; "
        "remove it (and revoke it, if the file was shared), then `wandb login` or set WANDB_API_KEY"
    )


def _plots_without_evaluation(config: TrainConfig) -> str | None:
    if not config.ttt.save_inner_loop_plots or config.do_eval:
        return None
    return (
        "ttt.save_inner_loop_plots: found true with do_eval: false; the plots are made of held-out "
        "data; set do_eval: true and data.eval_data, or save_inner_loop_plots: false"
    )


def _profile_range(config: TrainConfig) -> str | None:
    last = config.profile.start_step + config.profile.num_steps - 1
    if not config.profile.enable or last <= config.max_steps:
        return None
    return (
        f"profile: traces steps {config.profile.start_step} to {last}, but max_steps is "
        f"{config.max_steps}; lower profile.start_step or profile.num_steps"
    )


def _float64_on_gpu(config: TrainConfig) -> str | None:
    if config.param_dtype != "float64" or config.device != "cuda":
        return None
    return (
        "param_dtype: found float64 with device cuda; float64 is for proofs on a CPU; "
        "allowed there: auto, bfloat16, float32"
    )


def _length_schedule(config: TrainConfig) -> str | None:
    lengths = config.duration_sec
    if not isinstance(lengths, dict):
        return None
    late = [step for step in lengths if step >= config.max_steps]
    if 0 in lengths and not late:
        return None
    wrong = f"a length from step {late[0]} on" if late else "no length for the first steps"
    return (
        f"duration_sec: found {wrong} ({lengths}); allowed are steps done before a length begins, "
        f"0 among them and all below max_steps ({config.max_steps}), such as {{0: 3, 200: 9}}"
    )


def _empty_shard(config: TrainConfig) -> str | None:
    if config.parallel.dp_shard != 0:
        return None
    return "parallel.dp_shard: found 0; allowed: -1 (the rest of the world) or a whole number ≥ 1"


# (keys that the rule reads, rule): a rule isn't asked where one of its keys is wrong already.
_RULES: tuple[tuple[tuple[str, ...], Callable[[TrainConfig], str | None]], ...] = (
    (("full_finetuning", "lora.enable", "ttt.enable", "ttt.layers"), _nothing_to_train),
    (("full_finetuning", "lora.enable", "lora.scaling"), _lora_problem),
    (("wandb.key",), _key_in_file),
    (("ttt.save_inner_loop_plots", "do_eval"), _plots_without_evaluation),
    (("profile.start_step", "profile.num_steps", "max_steps"), _profile_range),
    (("param_dtype", "device"), _float64_on_gpu),
    (("parallel.dp_shard",), _empty_shard),
    (("duration_sec", "max_steps"), _length_schedule),
)


def read_config(path: Path | None, overrides: Sequence[str] = ()) -> ConfigReading:
    """Read the file `path` (None: defaults alone) and the overrides; raises for none of it."""
    data, problems = ({}, []) if path is None else yaml_input.read_mapping(path)
    unreadable = bool(problems) and not data
    data = {str(key): value for key, value in data.items()}
    data |= {name: {} for name in SECTIONS if name in data and data[name] is None}
    overridden: set[str] = set()
    uncertain: set[str] = set()
    for argument in overrides:
        override = yaml_input.parse_override(argument)
        if isinstance(override, str):
            problems.append(override)
            continue
        value, problem = yaml_input.parse_value(override)
        if problem is not None:
            problems.append(problem)
            uncertain.add(override.path)
            continue
        if is_text(override.path) and not isinstance(value, (str, list)):
            # A name such as 007 or 2024-01-01 is meant as typed, and so is nothing at all.
            text = override.text.strip()
            value = None if value is None and text else text
        data = yaml_input.merge(data, override.keys, value, SECTIONS)
        overridden.add(override.path)
    known = {"repo": str(REPO_ROOT), "time": TIME}
    data, unknown_placeholders = yaml_input.expand(data, known)
    problems += unknown_placeholders.values()
    uncertain |= {*unknown_placeholders}
    config, wrong = _validate(data, overridden)
    if unreadable:
        # The one problem is the file; that its keys are missing would only distract.
        wrong, uncertain = {}, set(KEYS)
    problems += wrong.values()
    bad_keys = uncertain | set(wrong)
    for key in KEYS:
        section, _, leaf = key.rpartition(".")
        value = getattr(getattr(config, section) if section else config, leaf)
        if isinstance(value, str) and TIME in value and key != "run_dir":
            problems.append(f"{key}: found {value!r}; {TIME} is allowed in run_dir alone")
    config = _absolute_paths(config)
    if not unreadable:
        for keys, rule in _RULES:
            sections = {key.split(".")[0] for key in keys}
            if not bad_keys & ({*keys} | sections) and (problem := rule(config)) is not None:
                problems.append(problem)
    return ConfigReading(config, tuple(problems), frozenset(bad_keys))


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """`read_config`, or a `UserError` with every problem in it."""
    reading = read_config(path, overrides)
    if reading.problems:
        source = "the configuration" if path is None else str(path)
        raise UserError(reading.problems, title=f"Can't use {source}")
    return reading.config


def parse_command_line(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """`[CONFIG] [key.path=value …]` → the config file (default: the demo) and the overrides."""
    files = [argument for argument in arguments if "=" not in argument]
    unknown = [argument for argument in files if argument.startswith("-")]
    if unknown or len(files) > 1:
        raise UserError(
            f"command line: found {' '.join(unknown or files)}; "
            "allowed: one config file, then key.path=value (without dashes or spaces)"
        )
    overrides = [argument for argument in arguments if "=" in argument]
    return (Path(files[0]) if files else DEFAULT_CONFIG), overrides


def utc_timestamp() -> str:
    """Now, as text for file names. Ranks differ: take rank 0's."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def resolve_run_dir(config: TrainConfig, timestamp: str) -> TrainConfig:
    """`config` with `${time}` in `run_dir` replaced by `timestamp`, which all ranks must share."""
    return config.model_copy(update={"run_dir": config.run_dir.replace(TIME, timestamp)})


def dump_yaml(config: TrainConfig) -> str:
    """`config` as YAML that loads again to an equal configuration. Secrets are left out."""
    data = config.model_dump(mode="json", exclude={"wandb": {"key"}})
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
