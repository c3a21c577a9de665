"""The run that meets no fault, which all others are compared with."""

import pytest

from tests.faults.jobs import EVERY, STEPS, TIMEOUT, Setting
from tests.integration.runs import TRAIN, Run
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def setting(paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> Setting:
    arguments = [
        *paths,
        *("param_dtype=float64", "device=cpu", "deterministic=true", "global_batch_size=2"),
        *(f"max_steps={STEPS}", f"ckpt_freq={EVERY}", "num_ckpt_keep=null", "do_eval=false"),
        "tensorboard=false",
    ]
    folder = tmp_path_factory.mktemp("whole") / "run"
    job = run_ranks(2, TRAIN, [*arguments, f"run_dir={folder}"], timeout=TIMEOUT)
    assert job.returncode == 0, job.stdout + job.stderr
    return Setting(arguments, Run(folder, job))
