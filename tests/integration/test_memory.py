"""`make memory`: the whole command at tiny size, and, in `make test-slow`, its thresholds."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from launch.config import load_config
from launch.memory import RUNS, folder_name, main
from launch.memory_report import JUDGED
from tests.ranks import run_command

pytestmark = pytest.mark.integration
MULTIPLES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10]
TINY = ("max_steps=2", "batch_size=2", "do_eval=false", "log_freq=1")


def memory(demo_base: Path, folder: Path, *overrides: str, timeout: float) -> CompletedProcess[str]:
    places = ["--work", str(folder / "work"), "--out", str(folder / "out")]
    command = [sys.executable, "-m", "launch.memory", *places, "--demo-base", str(demo_base)]
    return run_command([*command, *overrides], timeout=timeout)


def test_two_steps_prove_nothing_and_say_so(demo_base, tmp_path, capsys):
    job = memory(demo_base, tmp_path, *TINY, timeout=280)
    assert "Traceback" not in job.stderr, job.stderr
    assert job.returncode == 1, job.stdout + job.stderr
    assert "MISSED: with TTT, returning after 2 times the reach" in job.stdout

    windows = {"with TTT": "TTT layers=5 (2 layers)", "looks ahead": "TTT layers=5 (2 layers)"}
    windows["without TTT"] = "other layers=5 (2 layers)"
    configs = {}
    for run in RUNS:
        folder = tmp_path / "work" / folder_name(run)
        log = folder.with_name(f"{folder.name}.log").read_text()
        assert f"attention context: {windows[run]}\n" in log
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        configs[run] = load_config(folder / "config.yaml").model_dump(exclude={"run_dir"})
    assert not configs["looks ahead"]["ttt"].pop("causal")
    assert configs["without TTT"]["ttt"].pop("layers") == "none"
    # But for these the runs are the same.
    configs["with TTT"]["ttt"].pop("causal"), configs["without TTT"]["ttt"].pop("causal")
    configs["with TTT"]["ttt"].pop("layers"), configs["looks ahead"]["ttt"].pop("layers")
    assert configs["with TTT"] == configs["looks ahead"] == configs["without TTT"]

    found = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert (found["reach"], found["chance"], found["steps"]) == (8, math.log(64), 2)
    with (tmp_path / "out" / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == set(RUNS)
    for run in RUNS:
        gaps = [float(row["gap_in_reaches"]) for row in rows if row["run"] == run]
        assert gaps == MULTIPLES
        assert set(JUDGED) <= set(gaps)

    with pytest.raises(SystemExit) as again:
        main(["--work", str(tmp_path / "work"), *TINY])
    assert again.value.code == 2
    assert "exists; nothing is ever overwritten" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ttt_remembers_what_attention_cannot(demo_base, tmp_path):
    """As `make memory` runs it: 30 minutes at most on 2 idle cores, twice that on busy ones."""
    job = memory(demo_base, tmp_path, timeout=3500)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "MISSED" not in job.stdout
