"""`launch/verify.py` as a person runs it: a right layout passes, planted faults are named."""

import json
import re

import pytest

from tests.integration.runs import single
from tests.ranks import REPO, run_ranks

pytestmark = pytest.mark.integration
VERIFY = REPO / "launch" / "verify.py"
TIMEOUT = 120  # of a command line

# Several command lines of verify.py in one job, as a third of a job's time goes into its start;
# with faults planted into the code that it checks.
SEVERAL = """
import json
import sys
from contextlib import nullcontext
from unittest.mock import patch

sys.path.insert(0, {repo!r})
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from launch import step, verify
from parallel.mesh import leave_job
from ttt_dist.moshi.carry import LayerPassage

right = verify.accumulate_gradients


def wrong(model, *rest, **settings):
    loss = right(model, *rest, **settings)
    parameters = dict(model.named_parameters())
    assert isinstance(parameters[{scaled!r}].grad, DTensor)
    parameters[{scaled!r}].grad.mul_(1 + 1e-4)
    if dist.get_rank() == 1:
        parameters[{replicated!r}].grad.to_local().mul_(1 + 1e-4)
    return loss


def local(values, group):
    return values.detach().clone()


def forgotten(passage):
    return passage.before.window.reset(passage.begins | True)


verify.init_process_group(verify.TIMEOUT)
codes = []
for fault, arguments in json.loads(sys.argv[1]).items():
    faults = {{
        "gradients": patch.object(verify, "accumulate_gradients", wrong),
        "local weights": patch.object(step, "sum_over_data_ranks", local),
        "cut windows": patch.object(LayerPassage, "window", property(forgotten)),
    }}
    # One process group serves them all.
    with (
        patch.object(verify, "init_process_group", lambda timeout: None),
        patch.object(verify, "close_process_group", dist.barrier),
        faults.get(fault, nullcontext()),
    ):
        codes.append(verify.main([*arguments, "max_steps=1"]))
    if dist.get_rank() == 0:
        print({end!r}, codes[-1], flush=True)
leave_job(max(codes))
"""
SCALED = "transformer.layers.2.ttt.layer.wk.weight"
REPLICATED = "transformer.layers.1.ttt.layer.wo.bias"
# Fault -> command line; one step each.
RUNS = {
    "gradients": ["parallel.tp=2"],
    "local weights": ["ttt.inner_model=linear"],
    "cut windows": ["ttt.persistent_states=true"],
    "none, along recordings": ["ttt.persistent_states=true", "parallel.tp=2"],
    "none": [
        *("full_finetuning=false", "lora.enable=true", "lora.rank=5", "lora.ft_embed=true"),
        "parallel.tp=2",
    ],
}
END = "----- exit code"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Fault -> what verify printed and its exit code, from two ranks."""
    script = tmp_path_factory.mktemp("verify") / "several.py"
    script.write_text(SEVERAL.format(repo=str(REPO), scaled=SCALED, replicated=REPLICATED, end=END))
    job = run_ranks(2, script, [json.dumps(RUNS)], timeout=len(RUNS) * TIMEOUT)
    found = re.findall(rf"(.*?){END} (\d+)\n", job.stdout, re.DOTALL)
    assert len(found) == len(RUNS), job.stdout + job.stderr
    # A verdict against the layout ends the job as a failed one.
    assert job.returncode != 0
    assert re.search(r"exitcode +: 1 ", job.stderr)
    return {fault: (out, int(code)) for fault, (out, code) in zip(RUNS, found, strict=True)}


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
            worst, bound, name = row(dtype, what, r"\(\d+\)", figure, figure, r"([\w. -]+)")
            assert 0 <= float(worst) <= float(bound)
            # Told is what comes nearest to its bound; in float32 a rate's bias, a sum that cancels,
            # may have its own.
            own = (dtype, what) == ("float32", "gradient") and name.endswith("ttt_lr_bias")
            assert bound == allowed or (own and float(allowed) < float(bound) < 3e-5)
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


def test_wrong_gradients_are_found_and_their_modules_named(told):
    """One is scaled everywhere; one on rank 1 alone, where rank 0 has the same tensor right."""
    out, code = told["gradients"]
    assert code == 1
    assert "verify: all within" not in out
    assert modules_named(out) == {"transformer.layers.1.ttt", "transformer.layers.2.ttt"}
    for what, wanted in (("gradient", SCALED), ("gradient across ranks", REPLICATED)):
        line = rf"  float64 {what}, (\S+): found (\S+), allowed 1.0e-06"
        ((name, error),) = re.findall(line, out)
        assert name == wanted
        # The sums that stand for a tensor across ranks may be larger than its norm.
        limit = 1e-4 if what == "gradient" else 1e-3
        assert 0.9e-4 < float(error) < 1.1 * limit


def test_a_loss_divided_by_local_weights_is_found(told):
    out, code = told["local weights"]
    assert code == 1
    assert "float64 loss, step 1: found" in out
    assert {"transformer.layers.0.self_attn", "depformer", "heads"} <= modules_named(out)


def test_pieces_of_recordings_over_ranks_are_whole_samples_of_one_process(told):
    out, code = told["none, along recordings"]
    assert code == 0, out
    assert "states carried from piece to piece true" in out
    assert re.search(r"^ +float64 +gradient \(", out, re.MULTILINE)


def test_windows_cut_at_the_borders_of_pieces_are_found(told):
    out, code = told["cut windows"]
    assert code == 1
    assert "transformer.layers.0.self_attn" in modules_named(out)


def test_adapters_over_ranks_pass(told):
    """The last in its job, after those with faults: none of these lives on."""
    out, code = told["none"]
    assert code == 0
    assert "full_finetuning false, lora of rank 5, ft_embed true" in out
    assert out.endswith("verify: all within tolerance\n")
    (compared,) = re.findall(r"^ +float64 +gradient \((\d+)\)", out, re.MULTILINE)
    (total,) = re.findall(r"^ +float64 +initial value \((\d+)\)", out, re.MULTILINE)
    # Gradients of adapters, TTT and embeddings alone were there to compare.
    assert 200 < int(compared) < int(total)


def test_mistakes_are_told_once(tmp_path):
    mistakes = ["ttt.layers=9", "optim.learning_rate=1", "data.train_data=", "batch_size=3"]
    job = single([*mistakes, "global_batch_size=8"], script=VERIFY)
    assert job.returncode == 2
    assert job.stdout == ""
    head, *problems = job.stderr.splitlines()
    assert head == "Can't verify this configuration: 3 problems."
    for start in ("ttt.layers: found '9'", "optim.learning_rate: unknown", "global_batch_size: "):
        assert sum(line.startswith(f"  - {start}") for line in problems) == 1, job.stderr
