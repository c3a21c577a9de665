"""A person's mistakes at the real command: one message, once, exit code 2, no traceback."""

import json
import shutil
import time

import pytest

from tests.integration.runs import DEMO, TRAIN, side_by_side
from tests.ranks import REPO, run_ranks

pytestmark = pytest.mark.integration
MESSAGE = "This run can't start: "
TEA = REPO / "configs" / "demo" / "audio" / "tea.flac"


def problems_told(stderr: str) -> list[str]:
    """The problems of the one message in `stderr`."""
    assert stderr.count(MESSAGE) == 1, stderr
    lines = stderr[stderr.index(MESSAGE) :].splitlines()
    told = [line for line in lines if line.startswith("  - ")]
    assert lines[0] == f"{MESSAGE}{len(told)} problem{'s' if len(told) > 1 else ''}."
    return told


def test_many_mistakes_at_once_on_two_ranks(paths, tmp_path):
    run_dir = tmp_path / "run"
    mistakes = [
        *("parallel.tp=3", "optim.learning_rate=1e-4", "ttt.layers=1,2,9"),
        *(f"data.train_data={tmp_path / 'train.jsonl'}", "lora.enable=true"),
    ]
    started = time.monotonic()
    job = run_ranks(2, TRAIN, [*paths, f"run_dir={run_dir}", *mistakes], timeout=100)
    took = time.monotonic() - started
    told = problems_told(job.stderr)  # once, not once a rank
    wanted = {
        "parallel: there are 2 ranks": "start 3 ranks",
        "parallel.tp: found 3": "allowed: 1, 2, 4, 8",
        "optim.learning_rate: unknown key": "optim.lr",
        "ttt.layers: found '1,2,9'": "from 0 to 3",
        f"data.train_data: found '{tmp_path / 'train.jsonl'}'": "no file or folder",
        "lora.enable: found true": "set full_finetuning: false",
    }
    for start, way_out in wanted.items():
        (line,) = [line for line in told if line.startswith(f"  - {start}")]
        assert way_out in line
    assert len(told) == len(wanted)
    # torchrun ends with 1 whatever the ranks end with, and reports theirs.
    assert job.returncode != 0
    report = job.stderr[job.stderr.index("Root Cause") :]
    assert "exitcode  : 2 " in report
    # torchrun's own traceback follows; none of ours, and none that goes through our files.
    assert "Traceback" not in job.stderr[: job.stderr.index("torch/distributed/elastic")]
    assert f'File "{REPO / "launch"}' not in job.stderr
    assert job.stdout == ""
    assert not run_dir.exists()
    # Nobody waits for ranks that have gone: 7 s on 2 idle cores, and no 15 s of grace on top.
    assert took < 40


@pytest.fixture(scope="module")
def refused(paths, demo_base, tmp_path_factory):
    """Jobs that can't start, and the folder that their runs would have had."""
    folder = tmp_path_factory.mktemp("mistakes")
    noise = folder / "noise"
    noise.mkdir()
    (noise / "talk.wav").write_text("This is not audio.\n")
    (noise / "talk.json").write_text('{"alignments": []}')
    torn = folder / "torn"
    torn.mkdir()
    shutil.copy(TEA, torn)
    (torn / "tea.json").write_text('{"alignments": [["hi", [0.1')
    for name, audio in ((noise, "talk.wav"), (torn, "tea.flac")):
        line = json.dumps({"path": audio, "duration": 36.1209375})
        (name / "train.jsonl").write_text(line + "\n")
    with_key = folder / "with-key.yaml"
    with_key.write_text(DEMO.read_text() + "\nwandb:\n  key: sentinel-51b0\n")
    mesh, layers = ("parallel.dp_shard=3", "parallel.tp=2"), "ttt.layers=9"
    cases = {
        "several": [str(with_key), f"data.train_data={noise / 'train.jsonl'}", *mesh, layers],
        "alignments": [f"data.train_data={torn / 'train.jsonl'}"],
        "base": [f"moshi_paths.hf_repo_id={noise}"],
    }
    common = [*paths, "do_eval=false", f"run_dir={folder / 'runs'}/${{time}}"]
    jobs = side_by_side(
        {name: [*common, *arguments] for name, arguments in cases.items()} | {"help": ["--help"]}
    )
    return jobs, folder


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "several",
            [
                ["wandb.key", "WANDB_API_KEY"],
                ["there is 1 rank", "dp_shard 3 * tp 2 = 6", "start 6 ranks"],
                ["train.jsonl:1", "talk.wav", "unreadable", "wav, flac, mp3"],
                ["ttt.layers", "'9'", "from 0 to 3"],
            ],
        ),
        ("alignments", [["tea.json", "is no JSON", "must hold"]]),
        ("base", [["moshi_paths.hf_repo_id", "noise", "no config.json"]]),
    ],
)
def test_mistakes_of_one_process(refused, name, wanted):
    job = refused[0][name]
    assert job.returncode == 2, job.stdout + job.stderr
    for line, parts in zip(problems_told(job.stderr), wanted, strict=True):
        for part in parts:
            assert part in line
    assert "Traceback" not in job.stderr
    assert "sentinel-51b0" not in job.stdout + job.stderr


def test_mistakes_leave_no_run_folder_but_where_encoding_found_them(refused):
    (folder,) = (refused[1] / "runs").iterdir()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert "tea.json" in status["reason"]


def test_help_lists_every_key(refused):
    job = refused[0]["help"]
    assert job.returncode == 0, job.stderr
    for part in (
        "torchrun --nproc_per_node=8 launch/train.py",
        "optim.lr: a number",
        "parallel.tp",
    ):
        assert part in job.stdout
