"""`launch/verify.py` as a person runs it: a right layout passes, planted faults are named."""

import re

import pytest

from tests.integration.runs import single
from tests.ranks import REPO, run_ranks

pytestmark = pytest.mark.integration
VERIFY = REPO / "launch" / "verify.py"
TIMEOUT = 120

# verify.py with a fault planted into the code that it checks.
FAULTY = """
import sys

sys.path.insert(0, {repo!r})
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from launch import step, verify
from parallel.mesh import leave_job

fault, *arguments = sys.argv[1:]
right = verify.accumulate_gradients


def wrong(model, *rest, **settings):
    loss = right(model, *rest, **settings)
    parameters = dict(model.named_parameters())
    assert isinstance(parameters[{scaled!r}].grad, DTensor)
    parameters[{scaled!r}].grad.mul_(1 + 1e-4)
    if dist.get_rank() == 1:
        parameters[{replicated!r}].grad.to_local().mul_(1 + 1e-4)
    return loss


if fault == "local weights":
    step.sum_over_data_ranks = lambda values, group: values.detach().clone()
else:
    verify.accumulate_gradients = wrong
leave_job(verify.main(arguments))
"""
SCALED = "transformer.layers.2.ttt.layer.wk.weight"
REPLICATED = "transformer.layers.1.ttt.layer.wo.bias"


@pytest.fixture
def faulty(tmp_path):
    """`faulty(fault, *arguments)`: two ranks, each step wrong in the way that `fault` names."""
    script = tmp_path / "faulty_verify.py"
    script.write_text(FAULTY.format(repo=str(REPO), scaled=SCALED, replicated=REPLICATED))

    def start(fault, *arguments):
        return run_ranks(2, script, [fault, "max_steps=1", *arguments], timeout=TIMEOUT)

    return start


def modules_named(output):
    """The modules of the verdict, which stands below the tables."""
    (line,) = re.findall(r"^modules: (.*)$", output, re.MULTILINE)
    return set(re.findall(r"([\w.]+) \(\d+\)", line))


def test_tensor_parallel_demo_passes_and_prints_its_tables(tmp_path):
    job = run_ranks(2, VERIFY, ["parallel.tp=2"], timeout=TIMEOUT, cwd=tmp_path)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.startswith("2 ranks, cpu, gloo: dp_replicate 1 x dp_shard 1 x tp 2\n")
    assert job.stdout.endswith("verify: all within tolerance\n")
    assert list(tmp_path.iterdir()) == []  # nothing is written
    assert "5 of 5 clipped" in job.stdout

    def row(*cells):
        pattern = r"^ *" + r" +".join(cells) + r"$"
        found = re.findall(pattern, job.stdout, re.MULTILINE)
        assert len(found) == 1, (pattern, job.stdout)
        return found[0]

    figure, count = r"(\S+)", r"([\d,]+)"
    for dtype, allowed in (("float64", "1.0e-06"), ("float32", "1.0e-05")):
        for what in ("loss", "gradient norm", "gradient", "gradient across ranks"):
            worst = row(dtype, what, r"\(\d+\)", figure, allowed, r"[\w. -]+")
            assert 0 <= float(worst) <= float(allowed)
    # Five steps were taken, and the layouts differ by roundings: a comparison with itself is 0.
    assert float(row("float64", "parameter", r"\(\d+\)", figure, "1.0e-06", r"[\w. ]+")) > 0
    for module in ("embeddings", "heads", "depformer", r"transformer\.layers\.1\.ttt"):
        row(module, count, *[r"\S+"] * 3)
    for layer in range(4):
        for part in ("self_attn", "gating", "norms"):
            row(rf"transformer\.layers\.{layer}\.{part}", count, *[r"\S+"] * 3)
    calls, size = row("tp", "all-reduce", "float32", count, count)
    assert int(calls.replace(",", "")) > 2
    # Each of the two TTT layers reduces [1, 37, 64] in float32 at least twice, in two microbatches.
    assert int(size.replace(",", "")) > 2 * 2 * 2 * 37 * 64 * 4
    total, rank, share = row("optimizer state", count, count, figure)
    assert float(share) == pytest.approx(1.0, abs=0.05)
    assert int(rank.replace(",", "")) < 0.53 * int(total.replace(",", ""))


def test_wrong_gradients_are_found_and_their_modules_named(faulty):
    """One is scaled everywhere; one on rank 1 alone, where rank 0 has the same tensor right."""
    job = faulty("gradients", "parallel.tp=2")
    assert job.returncode != 0
    assert "verify: all within" not in job.stdout
    assert modules_named(job.stdout) == {"transformer.layers.1.ttt", "transformer.layers.2.ttt"}
    for what, wanted in (("gradient", SCALED), ("gradient across ranks", REPLICATED)):
        line = rf"  float64 {what}, (\S+): found (\S+), allowed 1.0e-06"
        ((name, error),) = re.findall(line, job.stdout)
        assert name == wanted
        # The sums that stand for a tensor across ranks may be larger than its norm.
        limit = 1e-4 if what == "gradient" else 1e-3
        assert 0.9e-4 < float(error) < 1.1 * limit
    assert re.search(r"exitcode +: 1 ", job.stderr)


def test_a_loss_divided_by_local_weights_is_found(faulty):
    job = faulty("local weights", "ttt.inner_model=linear")
    assert job.returncode != 0
    assert "float64 loss, step 1: found" in job.stdout
    assert {"transformer.layers.0.self_attn", "depformer", "heads"} <= modules_named(job.stdout)


def test_mistakes_are_told_once(tmp_path):
    mistakes = ["ttt.layers=9", "optim.learning_rate=1", "data.train_data=", "batch_size=3"]
    job = single([*mistakes, "global_batch_size=8"], script=VERIFY)
    assert job.returncode == 2
    assert job.stdout == ""
    head, *problems = job.stderr.splitlines()
    assert head == "Can't verify this configuration: 3 problems."
    for start in ("ttt.layers: found '9'", "optim.learning_rate: unknown", "global_batch_size: "):
        assert sum(line.startswith(f"  - {start}") for line in problems) == 1, job.stderr
