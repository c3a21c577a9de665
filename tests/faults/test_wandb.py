"""A W&B server that can't be reached, and the key that was meant for it."""

import pytest

from tests.integration.runs import Run, single

pytestmark = pytest.mark.faults
KEY = "0123456789" * 4


def test_a_run_goes_on_without_the_server_and_keeps_its_key_to_itself(setting, tmp_path):
    folder = tmp_path / "run"
    arguments = [*setting.arguments, f"run_dir={folder}", "max_steps=1", "wandb.project=p"]
    # Nothing listens on port 9 of this machine.
    settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    run = Run(folder, single(arguments, **settings))
    assert run.job.returncode == 0, run.job.stderr
    assert run.job.stderr.count("warning: no W&B: ") == 1
    assert run.status["state"] == "finished"
    assert [row["step"] for row in run.steps] == [1]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in run.job.stdout + run.job.stderr
