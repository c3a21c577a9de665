"""A run that was killed goes on bitwise; what a resumed run may not be."""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from launch.config import load_config
from launch.run_folder import RunFolder
from launch.run_status import write_status
from tests.integration.runs import (
    TIMEOUT,
    TRAIN,
    Run,
    check_trained,
    initial_model,
    side_by_side,
    single,
    snapshot,
)
from tests.ranks import kill_job, ranks_command, run_ranks, start_command
from ttt_dist.moshi.build import is_ttt_parameter

# Fixtures start up to five jobs, each with its own limit; a busy machine may need all of it.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
KILLED_AFTER, STEPS = 2, 4  # tp_run's checkpoints


class Resumed(NamedTuple):
    """A run that was killed and resumed; `rows_before` is what the kill left of metrics.jsonl."""

    run: Run
    rows_before: int
    status_before: str


@pytest.fixture(scope="module")
def resumed(short, tmp_path_factory) -> Resumed:
    """tp_run once more, killed once its first checkpoint is there, then resumed."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    arguments = [*short, f"run_dir={folder}", "parallel.tp=2"]
    first = folder / "checkpoints" / f"step-{KILLED_AFTER:06d}"
    deadline = time.monotonic() + TIMEOUT
    with start_command(ranks_command(2, TRAIN, arguments)) as process:
        while not first.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        kill_job(process)  # SIGKILL, as when a node loses its power
        out, err = process.communicate()
    assert first.exists(), out + err
    killed = Run(folder, process)
    rows, status = len(killed.rows), killed.status["state"]
    job = run_ranks(2, TRAIN, [*arguments, "resume=true"], timeout=TIMEOUT)
    assert job.returncode == 0, job.stdout + job.stderr
    return Resumed(Run(folder, job), rows, status)


def test_the_kill_was_a_real_one(resumed, tp_run):
    assert resumed.status_before == "running"
    assert resumed.rows_before < len(tp_run.rows)
    assert resumed.run.status["state"] == "finished"
    assert f"resumed after step {KILLED_AFTER} from" in resumed.run.job.stdout


def test_steps_after_a_resume_are_bitwise_those_of_an_uninterrupted_run(resumed, tp_run):
    rows = resumed.run.rows[resumed.rows_before :]
    steps = [row for row in rows if "loss" in row]
    expected = tp_run.steps[KILLED_AFTER:]
    assert [row["step"] for row in steps] == list(range(KILLED_AFTER + 1, STEPS + 1))
    for key in ("loss", "text_loss", "audio_loss", "grad_norm", "lr"):
        assert [row[key] for row in steps] == [row[key] for row in expected], key
    # The schedule moves, so the equal rates aren't equal by being constant.
    assert len({row["lr"] for row in steps}) == len(steps)
    (evaluation,) = [row for row in rows if "eval_loss" in row]
    wanted = tp_run.evaluations[-1]
    for key in wanted.keys() - {"time"}:
        assert evaluation[key] == wanted[key], key


def test_final_checkpoints_are_bitwise_equal(resumed, tp_run):
    assert resumed.run.checkpoints == tp_run.checkpoints == ["step-000002", "step-000004"]
    found, expected = resumed.run.checkpoint(STEPS), tp_run.checkpoint(STEPS)
    assert found.keys() == expected.keys()
    kinds = {name.split(".")[0] for name in expected}
    assert kinds == {"model", "optimizer", "random"}
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    halfway = tp_run.checkpoint(KILLED_AFTER)
    same = [n for n in expected if n.startswith("model.") and torch.equal(expected[n], halfway[n])]
    assert same == []


def begun(run: Run, folder: Path) -> Path:
    """What a run like this one has left, when it is killed before anything else."""
    folder.mkdir()
    shutil.copy(run.folder / "config.yaml", folder)
    return folder


def test_a_run_killed_before_its_first_checkpoint_starts_from_step_0(short, tp_run, tmp_path):
    folder = begun(tp_run, tmp_path / "run")
    job = single([*short, f"run_dir={folder}", "resume=true", "max_steps=1", "do_eval=false"])
    assert job.returncode == 0, job.stdout + job.stderr
    said = f"{folder / 'checkpoints'} holds no checkpoint yet: this run starts from step 0"
    assert job.stdout.splitlines().count(said) == 1
    assert [row["step"] for row in Run(folder, job).steps] == [1]


def test_a_run_that_ended_in_its_last_evaluation_makes_up_for_it(short, tp_run, tmp_path):
    """All steps are done and saved; on one rank instead of two."""
    folder = tmp_path / "run"
    shutil.copytree(tp_run.folder, folder)
    write_status(RunFolder(folder), "running", STEPS)
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:-1]))
    checkpoints = snapshot(folder / "checkpoints")
    run = Run(folder, single([*short, f"run_dir={folder}", "resume=true"]))
    assert run.job.returncode == 0, run.job.stdout + run.job.stderr
    assert run.status["state"] == "finished"
    assert (run.status["step"], run.status["first_step"]) == (STEPS, STEPS)
    assert len(run.rows) == len(tp_run.rows)
    # Layouts differ by rounding, as in test_train.
    wanted = {k: v for k, v in tp_run.evaluations[-1].items() if k != "time"}
    assert {k: run.evaluations[-1][k] for k in wanted} == pytest.approx(wanted, rel=1e-6)
    assert snapshot(folder / "checkpoints") == checkpoints


@pytest.fixture(scope="module")
def refused(short, tp_run, tmp_path_factory):
    """Starts that must not go on: their jobs, and tp_run's files before them."""
    damaged = begun(tp_run, tmp_path_factory.mktemp("damaged") / "run")
    (damaged / "checkpoints" / "damaged-step-000002").mkdir(parents=True)
    before = snapshot(tp_run.folder)
    jobs = side_by_side(
        {
            "existing": [*short, f"run_dir={tp_run.folder}"],
            "nothing left": [*short, f"run_dir={tp_run.folder}", "resume=true"],
            "damaged alone": [*short, f"run_dir={damaged}", "resume=true"],
        }
    )
    return jobs, before


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("existing", ["run_dir: ", "exists and isn't empty", "resume=true"]),
        ("nothing left", ["resume: ", "nothing is left to do"]),
        ("damaged alone", ["resume: ", "holds no checkpoint", "but damaged ones"]),
    ],
)
def test_a_refused_start_leaves_the_run_as_it_was(refused, tp_run, name, parts):
    jobs, before = refused
    job = jobs[name]
    assert job.returncode == 2, job.stdout + job.stderr
    assert job.stderr.count("This run can't start: ") == 1
    assert "Traceback" not in job.stderr
    for part in parts:
        assert part in job.stderr
    assert snapshot(tp_run.folder) == before


@pytest.fixture(scope="module")
def ttt_only(paths, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("ttt-only") / "run"
    settings = ["full_finetuning=false", "max_steps=2", "global_batch_size=1", "do_eval=false"]
    settings += ["tensorboard=false", "num_lanes=4"]
    job = single([*paths, *settings, f"run_dir={folder}"])
    assert job.returncode == 0, job.stdout + job.stderr
    return Run(folder, job)


def test_a_setting_without_effect_is_told_and_kept(ttt_only):
    said = "warning: num_lanes: has no effect, since ttt.persistent_states is false"
    assert ttt_only.job.stdout.splitlines().count(said) == 1
    # Lost, it would keep the same command from going on with this run.
    assert load_config(ttt_only.folder / "config.yaml").num_lanes == 4


def test_training_ttt_alone_leaves_moshi_untouched(ttt_only, demo_base):
    initial = dict(initial_model(ttt_only).named_parameters())
    saved = ttt_only.checkpoint(2)
    moshi = {name for name in initial if not is_ttt_parameter(name)}
    assert [name for name in moshi if not torch.equal(saved[f"model.{name}"], initial[name])] == []
    # And straight from the base's file, for all tensors that it doesn't pack.
    base = load_file(demo_base / "model.safetensors")
    common = [name for name in base if f"model.{name}" in saved]
    assert len(common) > 50
    # Packed weights differ in shape alone: [3, D, D] here, [3D, D] in a release.
    assert all(torch.equal(saved[f"model.{n}"].reshape(base[n].shape), base[n]) for n in common)
    assert not any(
        f"optimizer.state.{name}.exp_avg" in saved for name in moshi
    )  # no memory for what isn't trained
    check_trained(ttt_only, 2, set(initial) - moshi)
