"""Shell scripts are free of what shellcheck knows: unquoted names, untested `cd`, dead branches."""

import subprocess
import sys
from pathlib import Path

from tests.ranks import REPO

# By name: a checkout may hold other people's scripts below .venv and runs.
SCRIPTS = [REPO / "torchrun.sh", REPO / ".ci" / "run", REPO / "launch" / "slurm" / "train.sbatch"]


def test_every_script_is_named_here():
    tracked = [*REPO.glob("*.sh"), *REPO.glob(".ci/*"), *REPO.glob("launch/**/*.s*")]
    assert {path for path in tracked if path.suffix != ".py"} == set(SCRIPTS)


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    job = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
    assert (job.returncode, job.stdout, job.stderr) == (0, "", "")
