"""`status.json`: true while a run lives, and after it."""

from pathlib import Path

import pytest

from launch import run_status
from launch.run_folder import RunFolder
from launch.run_status import RunStatus, read_status, write_status


def told(folder: RunFolder) -> tuple:
    status = read_status(folder)
    return tuple(status[key] for key in ("state", "step", "first_step", "reason"))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_it_is_replaced_whole(folder):
    write_status(folder, "running", 0)
    write_status(folder, "failed", 7, "a rank was lost", first_step=3)
    assert told(folder) == ("failed", 7, 3, "a rank was lost")
    assert list(folder.path.iterdir()) == [folder.status]


def test_it_says_how_far_a_living_run_is(folder, monkeypatch):
    monkeypatch.setattr(run_status, "_EVERY_SECONDS", 0.0)
    with RunStatus(folder, 0, step=20) as status:
        assert told(folder) == ("running", 20, 20, "")
        status.resumed(18)  # the newest checkpoint was damaged
        assert told(folder) == ("running", 18, 18, "")
        status.done(19)
        assert told(folder) == ("running", 19, 18, "")
        status.preempted_by = "SIGUSR1"
    assert told(folder) == ("preempted", 19, 18, "SIGUSR1")


def test_short_steps_are_written_once_in_a_while(folder):
    with RunStatus(folder, 0) as status:
        status.done(1)
        assert told(folder)[1] == 0
    assert told(folder) == ("finished", 1, 0, "")


def test_an_error_is_its_reason_and_other_ranks_write_nothing(folder):
    with pytest.raises(ValueError, match="broken"), RunStatus(folder, 1):
        raise ValueError("broken")
    assert read_status(folder) == {}
    with pytest.raises(ValueError, match="broken"), RunStatus(folder, 0, step=4):
        raise ValueError("broken")
    assert told(folder) == ("failed", 4, 4, "ValueError: broken")


def test_what_was_told_as_failed_may_go_on(folder):
    with RunStatus(folder, 0) as status:
        status.failed("a step takes long")
        assert told(folder) == ("failed", 0, 0, "a step takes long")
        status.goes_on()
        assert told(folder) == ("running", 0, 0, "")


def test_what_is_no_status_reads_as_none(folder):
    folder.status.write_text("{")
    assert read_status(folder) == {}
