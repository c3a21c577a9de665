"""Every layout trains the model that one process trains (gloo ranks; cases.py lists the cases).

Five AdamW steps (fewer for variants of a layout) of eight samples, in two microbatches a rank,
with clipping, against one process that has each step's samples in one batch.

Tolerances (DESIGN.md, Numbers): whole models in float64 agree to 1e-6, since Moshi's norms and RoPE
compute in float32 whatever the model's dtype; in float32, loss and first-step gradients to 1e-5,
the rounding of sums in another order. Parameters after Adam steps are no test in float32: noise
over near-zero gradients is amplified.

One kind of tensor is worse conditioned than that: the gradient of a head's inner learning-rate bias
is one number, summed with both signs over all tokens. Unsharded float32 alone is off by up to 1e-5
from float64 there, so for these tensors two float32 runs may differ by three times what the
unsharded one is measured to be off (and no other tensor may need that).
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.distributed.cases import (
    ACCUMULATION,
    ALONG,
    CASES,
    LAYOUTS,
    MAX_NORM,
    RESHARDS,
    SAMPLES,
    TP_LAYOUTS,
    WAITING,
)
from tests.distributed.faults import FAULTS
from tests.ranks import run_ranks
from ttt_dist.ops import native

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "worker.py"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
# Jobs, by world size, whose scans run tensor code, as on GPUs; the others run C++ kernels.
TENSOR_CODE = ((4, "eager"), (2, "compiled"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """`measured(world_size, job)`: a job's results; it runs once, when it is first asked for."""
    done = {}
    failures = {}
    plain = {code: tmp_path_factory.mktemp("plain") for code in (True, False)}  # of all its jobs

    def measure(world_size, job="eager"):
        key = world_size, job
        if key not in done and key not in failures:
            folder = tmp_path_factory.mktemp(f"world{world_size}-{job}")
            results = folder / "results.json"
            tensor_code = key in TENSOR_CODE
            arguments = [*map(str, (results, folder, plain[tensor_code])), job]
            switch = {native.SWITCH: "0" if tensor_code else "1"}
            try:
                ended = run_ranks(world_size, WORKER, arguments, timeout=420, **switch)
                assert ended.returncode == 0, ended.stdout + ended.stderr
            except AssertionError as failure:  # also of a job whose time was up
                failures[key] = str(failure)
            else:
                done[key] = json.loads(results.read_text())
        assert key not in failures, failures[key]
        return done[key]

    return measure


@pytest.mark.parametrize("name", CASES)
def test_layout_trains_the_same_model(measured, name):
    case = CASES[name]
    trained = case.trained
    found = measured(case.ranks, case.job)[name]
    tolerance = TOLERANCE[trained.dtype]
    assert found["same_names"]
    assert found["start"][0] == 0, found["start"]  # the same initial values, bit for bit
    assert found["trained"]
    assert found["finite"]
    assert found["contexts"] == [[False, 7], [True, 5], [True, 5], [False, 7]]
    if trained.frozen or trained.lora_rank:
        assert found["untrained"]
        parts = [".ttt.", ".lora_", *(["emb"] if trained.ft_embed else [])]
        assert not any(part in name for name in found["untrained"] for part in parts)
    else:
        assert found["untrained"] == []

    assert len(found["losses"]) == len(found["norms"]) == case.steps
    for step, (sharded, plain) in enumerate(found["losses"]):
        assert sharded == pytest.approx(plain, rel=tolerance), step
    for step, (sharded, plain) in enumerate(found["norms"]):
        assert sharded == pytest.approx(plain, rel=tolerance), step
        assert plain > MAX_NORM, (step, "clipping does not act")
    if trained.dtype == torch.float64:
        assert found["gradients"][0] < tolerance, found["gradients"]
        if case.steps > 1:
            assert found["parameters"][0] < tolerance, found["parameters"]
    else:
        rounding = found["plain rounding"]
        for tensor, error in found["all gradients"].items():
            assert error < max(tolerance, 3 * rounding[tensor]), (tensor, error, rounding[tensor])
        over = [tensor for tensor, error in rounding.items() if 3 * error > tolerance]
        assert all(tensor.endswith("learnable_ttt_lr_bias") for tensor in over), over

    # Parameters, gradients and moments are shared out; norms and gates alone are whole on tp.
    elements = found["elements"]
    assert elements["held"] <= elements["allowed"], elements
    assert elements["extra"] < 0.02 * elements["total"], elements


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.trained.frozen])
def test_a_step_issues_these_collectives_and_no_others(measured, name):
    case = CASES[name]
    assert measured(case.ranks, case.job)[name]["traffic"] == expected_traffic(case)


@pytest.mark.parametrize("name", WAITING)
def test_gradients_that_wait_are_as_large_as_told(measured, name):
    found = measured(LAYOUTS[WAITING[name][0]][0])[f"waiting {name}"]
    assert found["kept"] == found["told"] > 0
    assert found["reduced every microbatch"] == 0


def test_every_group_of_a_mesh_has_its_timeout(measured):
    found = measured(2)["timeouts"]
    assert all(len(groups) >= 2 for groups in found.values())
    assert {seconds for groups in found.values() for seconds in groups} == {120.0}


def expected_traffic(case):
    """Collectives of a first step: 4 layers, 2 of them with TTT, and 2 layers of the Depformer."""
    layout, passes = LAYOUTS[case.layout][1], ACCUMULATION
    sizes = {"dp_replicate": layout.dp_replicate, "dp_shard": layout.dp_shard, "tp": layout.tp}
    if layout.dp_shard == -1:
        sizes["dp_shard"] = case.ranks // (layout.dp_replicate * layout.tp)
    found = Counter()

    def add(axes, kind, calls):
        over = [axis for axis in axes if sizes[axis] > 1]
        if over:
            found[" x ".join(over) + " " + kind] += calls

    # FSDP2 gathers a unit for each forward and each backward; the root's weights, needed last and
    # first, once. Gradients are reduced once a step, however many microbatches there are.
    units = {("dp_shard",): (4 + 2, 0), ("dp_shard", "tp"): (2, 1)}
    for axes, (freed, root) in units.items():
        reductions = passes if case.reduce_every_microbatch else 1
        add(axes, "all-gather", (2 * freed + root) * passes)
        add(axes, "reduce-scatter", (freed + root) * reductions)
        add(("dp_replicate",), "all-reduce", freed + root)
    add(("dp_replicate", "dp_shard"), "all-reduce", 2)  # the loss's weights and its sums
    # On tp attention, feed-forward and TTT sum an output forward and an input's gradient backward;
    # TTT's norm gathers statistics. The Depformer gathers losses and sums its input's gradient.
    add(("tp",), "all-reduce", (2 * (4 * 2 + 2) + 1) * passes)
    if case.trained.lora_rank:
        # Four layers' four matrices that are whole on every rank; and without trained embeddings
        # the first layer's input has no gradient.
        add(("tp",), "all-reduce", (4 * 4 - (not case.trained.ft_embed)) * passes)
    add(("tp",), "all-gather", (2 + 1) * passes)
    add(("tp",), "reduce-scatter", 2 * passes)
    if case.plan.get("recompute") != "none":
        # Again: what a later operator of the same part needs. That's the attention's sum in layers
        # that are one part, and the statistics. Compiled parts run again as a whole.
        again = 4 * 2 + 2 if case.plan.get("compile") else 2
        add(("tp",), "all-reduce", again * passes)
        add(("tp",), "all-gather", 2 * passes)
    return dict(found)


@pytest.mark.parametrize("layout", TP_LAYOUTS)
def test_placement_words_and_sharded_norm(measured, layout):
    world_size, ranks = LAYOUTS[layout][0], LAYOUTS[layout][1].tp
    found = measured(world_size)[f"placement {layout}"]
    assert found["placed_values"]
    assert found["placed_shape"]
    assert found["round_trip_gradient"]
    assert "(3, 1)" in found["wrong_shape"]
    total = sum(range(1, ranks + 1))
    assert found["partial_gradient"] == [total, total]
    frames = {"own": -(-7 // ranks), "values": True, "gradient": True, "integers": True}
    assert found["frames"] == frames
    # A mean of 1e4 beside a spread of 1 costs float32 four of its seven digits on one device too.
    norm = found["norm"]
    for name in ("output", "input gradient", "weight gradient"):
        assert norm[name] < max(2 * norm[f"one device's {name}"], 1e-5), norm


@pytest.mark.parametrize("layout", TP_LAYOUTS)
def test_layer_equals_the_unsplit_one_with_little_traffic(measured, layout):
    """1e-6 in float64: Moshi's two norms compute in float32 whatever the layer's dtype."""
    world_size, ranks = LAYOUTS[layout][0], LAYOUTS[layout][1].tp
    found = measured(world_size)[f"layer {layout}"]
    assert found["error"][0] < 1e-6, found["error"]
    # Attention, TTT and feed-forward sum their outputs, in the backward their inputs' gradients;
    # TTT's norm gathers two float32 statistics a token. Nothing gathers weights or activations.
    # A rank does its share of the matrix work, attention and inner steps included.
    assert found["work"] == pytest.approx(1 / ranks, rel=0.05)
    assert found["forward"] == {"all_gather_into_tensor": 1, "all_reduce": 3}
    assert found["backward"] == {"reduce_scatter_tensor": 1, "all_reduce": 3}


@pytest.mark.parametrize("layout", TP_LAYOUTS)
def test_attention_windows_carried_on_own_heads_are_one_call_on_all(measured, layout):
    """1e-5: float32 sums in another order, rope at other positions of the same distance."""
    world_size, ranks = LAYOUTS[layout][0], LAYOUTS[layout][1].tp
    found = measured(world_size)[f"window {layout}"]
    assert found["window"] == [2, 8 // ranks, 7 - 1, 64 // 8]
    assert found["error"][0] < 1e-5, found["error"]


@pytest.mark.parametrize("name", RESHARDS)
def test_checkpoint_of_another_layout_loads_bitwise(measured, name):
    world_size = LAYOUTS[RESHARDS[name][0]][0]
    found = measured(world_size)[f"reshard {name}"]
    assert found["progress"] == [1, SAMPLES]
    assert found["same_names"]
    assert found["moments"] > 100
    assert found["different"] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_catches_a_planted_fault(measured, fault):
    """Sound layouts stay below 1e-6; each of these mistakes is off by thousands of times that."""
    world_size = LAYOUTS[FAULTS[fault][0]][0]
    error, _ = measured(world_size)[f"fault {fault}"]["gradients"]
    assert not error < 1e-3  # a NaN is caught too


@pytest.mark.parametrize("name", ALONG)
def test_training_along_recordings_is_that_of_one_process_on_any_layout(measured, name):
    """Lanes' states go from step to step, through a checkpoint and onto another layout."""
    world_size = LAYOUTS[ALONG[name][0]][0]
    found = measured(world_size)[f"along {name}"]
    tolerance = TOLERANCE[torch.float64]
    for kind in ("losses", "norms"):
        sharded, plain = found[kind]
        for step, (own, expected) in enumerate(zip(sharded, plain, strict=True)):
            assert own == pytest.approx(expected, rel=tolerance), (kind, step)
    for what in ("gradients 0", "gradients 2", "parameters", "carried"):
        assert found[what][0] < tolerance, (what, found[what])
    own, expected = found["health"]
    assert own == pytest.approx(expected, rel=tolerance)
    assert found["not finite"] == "layer 2 TTT: state before, W2"
    for own, expected in found["inner losses"]:
        assert len(own) == 96 // 8  # bins of the longest recording
        assert own == pytest.approx(expected, rel=tolerance)
    tp = LAYOUTS[ALONG[name][1]][1].tp > 1
    heads = {placements[-1] for key, placements in found["sharded"].items() if "W1" in key}
    assert heads == {"S(1)" if tp else "S(0)"}
