"""Exports of one set of weights are the same file, whatever layout saved them; and they load."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from launch.export import main
from tests.distributed.export_worker import STEP, trained_value
from tests.ranks import run_command, run_ranks
from ttt_dist.moshi.build import is_ttt_parameter

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
WORKER = Path(__file__).parent / "export_worker.py"
LAYOUTS = {2: ["2x1", "1x2"], 4: ["4x1", "2x2"]}  # ranks: FSDP shards x tp


def run_worker(ranks: int, arguments: list[str]) -> None:
    job = run_ranks(ranks, WORKER, arguments, timeout=200)
    assert job.returncode == 0, job.stdout + job.stderr


def export(run: Path, *options: str) -> Path:
    out = run / ("-".join(("out", *options)))
    main([str(run), "--out", str(out), *options])
    return out


@pytest.fixture(scope="module")
def runs(demo_base, tmp_path_factory) -> Path:
    """The checkpoint of one rank, and its export in float32."""
    runs = tmp_path_factory.mktemp("runs")
    run_worker(1, [str(demo_base), str(runs), "1x1"])
    return runs


@pytest.fixture(scope="module")
def exported(runs) -> Path:
    return export(runs / "1x1", "--dtype", "float32")


@pytest.fixture(scope="module")
def adapters(runs) -> Path:
    return export(runs / "lora", "--adapters-only", "--dtype", "float32")


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_layout_gives_the_same_file_and_loads_it(demo_base, runs, exported, adapters, ranks):
    """The worker compares each rank's part of the loaded weights, adapters' too, bit by bit, and
    counts what the rank read.
    """
    releases = [str(exported), str(adapters)]
    run_worker(ranks, [str(demo_base), str(runs), *releases, *LAYOUTS[ranks]])
    expected = (exported / "model.safetensors").read_bytes()
    for layout in LAYOUTS[ranks]:
        found = export(runs / layout, "--dtype", "float32")
        assert (found / "model.safetensors").read_bytes() == expected, layout
        assert (found / "config.json").read_bytes() == (exported / "config.json").read_bytes()


def test_values_shapes_and_dtypes_of_the_files(runs, exported, demo_base):
    """Moshi's tensors have the base's shapes; bfloat16 is the rounded float32; TTT stays exact."""
    base = load_file(demo_base / "model.safetensors")
    whole = load_file(exported / "model.safetensors")
    rounded = load_file(export(runs / "1x1") / "model.safetensors")
    alone_folder = export(runs / "1x1", "--base-only")
    alone = load_file(alone_folder / "model.safetensors")
    assert whole.keys() == rounded.keys()
    assert {n: t.shape for n, t in base.items()} == {n: t.shape for n, t in alone.items()}
    assert {n for n in whole if not is_ttt_parameter(n)} == alone.keys() == base.keys()
    assert sum(map(is_ttt_parameter, whole)) == 2 * 19
    for name, value in whole.items():
        assert value.dtype == torch.float32
        # The worker's values have the shape in training, [3, D, D] for attention's [3D, D].
        parts = 3 if "in_projs" in name else 2 if "linear_in" in name else 1
        stacked = (parts, value.shape[0] // parts, *value.shape[1:])
        shapes = {tuple(value.shape), stacked} if parts > 1 else {tuple(value.shape)}
        assert any(torch.equal(value.view(s), trained_value(name, s)) for s in shapes), name
    for name, value in rounded.items():
        assert torch.equal(value, whole[name].to(value.dtype)), name
        assert value.dtype == (torch.float32 if is_ttt_parameter(name) else torch.bfloat16), name
    assert all(torch.equal(value, rounded[name]) for name, value in alone.items())
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": str(STEP)}
    copied = {path.name for path in demo_base.iterdir()}
    assert {path.name for path in alone_folder.iterdir()} == copied
    for name in ("mimi.safetensors", "tokenizer.model"):
        assert (alone_folder / name).read_bytes() == (demo_base / name).read_bytes()


@pytest.mark.slow
def test_host_memory_of_an_export(tmp_path):
    """A model of 1.2 GB on one rank: its largest tensor, the part read for it, and a piece cast.

    Anonymous memory alone counts: pages of files can be given back at any time.
    """
    folder = tmp_path / "large"
    worker = Path(__file__).parent / "export_memory_worker.py"
    jobs = [["make", str(folder)]] + [["export", str(folder), d] for d in ("float32", "bfloat16")]
    for arguments in jobs:
        job = run_command([sys.executable, str(worker), *arguments], timeout=300)
        assert job.returncode == 0, job.stdout + job.stderr
    for dtype in ("float32", "bfloat16"):
        found = json.loads((folder / f"{dtype}.json").read_text())
        assert found["model"] > 1e9
        assert found["above"] > 0.9 * found["largest"]  # the peak was seen
        # What has no tensor's size (modules on meta, metadata, pieces of 16 MiB) takes 27 MiB; 64
        # MiB of freed memory stay with the C library, which keeps twice the largest block that it
        # ever gave back in one piece, 32 MiB. Without that (MALLOC_MMAP_THRESHOLD_=1000000) both
        # dtypes take 27 MiB above the two tensors.
        assert found["above"] < 2 * found["largest"] + (27 + 64) * 2**20, found
        assert 3 * found["above"] < found["model"], found
    assert found["model"] / 2 < (folder / "bfloat16" / "model.safetensors").stat().st_size
    shutil.rmtree(folder)
