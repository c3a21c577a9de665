"""Causality, precision, memory, checkpointing, surroundings and error messages of the ops."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.unit.ops_cases import FRAMES, OPS, gradients, make_case, objective, relative
from ttt_dist.ops import apply_rope, linear_state, mlp_state, rope_table, stream_positions
from ttt_dist.ops.dual_form import dual_form


def frames_moved(inner, causal, frame, name, carried):
    """Which outputs change, bitwise, when one frame of one input does."""
    case = make_case(inner, 1, 2, 11, causal=causal)
    state = case.fresh()
    if carried:
        _, state = make_case(inner, 1, 2, 6, seed=3).run(state)
    before, _ = case.run(state)
    with torch.no_grad():
        case.x[name][:, :, frame] *= 1.5
    after, _ = case.run(state)
    return (before != after).any(dim=-1).any(dim=1)[0]  # [L]


@pytest.mark.usefixtures("either_code")
@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("carried", [False, True])
def test_causality_is_exact(inner, name, carried):
    for frame in (2, 3, 5, 9, 10):
        moved = frames_moved(inner, True, frame, name, carried)
        assert not moved[:frame].any(), frame
        assert moved[frame]


@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_bidirectional_form_reads_ahead_within_a_mini_batch(inner):
    """What the test above must be able to see: frame 6 reaches frames 4 and 5, none before."""
    moved = frames_moved(inner, False, 6, "v", carried=False)
    assert not moved[:4].any()
    assert moved[4:].all()


@pytest.mark.usefixtures("either_code")
@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("twin", [False, True])
def test_checkpointing_changes_nothing(inner, carried, twin):
    """Recomputation repeats the same kernels: outputs and gradients are bitwise equal, but for the
    norm's two gradients, which are summed up group by group: 1e-14 for another order."""
    case = make_case(inner, 2, 2, 23)
    results = []
    for group_size in (None, 0, 1, 2, 16):
        state = case.fresh()
        if carried:
            _, state = make_case(inner, 2, 2, 6, seed=3).run(state)
            _, state = case.run(state, 0, 3)
        op = dual_form if twin else OPS[inner]
        out, after = case.run(state, op=op, checkpoint_group_size=group_size)
        results.append({"out": out} | gradients(objective(out, after), case.x))
    first = results[0]
    for other in results[1:]:
        for name, found in other.items():
            if name.startswith("ln_"):
                assert relative(found, first[name]) < 1e-14
            else:
                assert torch.equal(found, first[name]), name


@pytest.mark.usefixtures("either_code")
@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_within_an_outer_checkpoint(inner):
    case = make_case(inner, 2, 2, 23, checkpoint_group_size=2)

    def call(*_):
        out, after = case.run(case.fresh())
        return objective(out, after)

    plain = gradients(call(), case.x)
    nested = gradients(checkpoint(call, *case.x.values(), use_reentrant=False), case.x)
    assert all(torch.equal(plain[n], nested[n]) for n in plain)


@pytest.mark.usefixtures("either_code")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    case = make_case("mlp", 2, 2, 11)
    expected, _ = case.run(case.fresh())
    with mode():
        outs, state = case.run_pieces([3, 1, 7])
    assert not outs.requires_grad
    assert relative(outs, expected) < 1e-10  # the split reorders sums, nothing else
    assert not any(t.requires_grad for t in state.tensors().values())


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_stays_float32(inner, dtype):
    """Against float64 over six mini-batches: a few roundings in a row, of 2^-9 with bf16 operands
    and of 2^-24 in float32 (measured: 4e-3 and 2e-7); gradients take about three times as many."""
    exact = make_case(inner, 2, 2, 23, d=16, C=4)
    case = make_case(inner, 2, 2, 23, d=16, C=4)
    low = {n: t.detach().to(dtype if n in "qkv" else torch.float32) for n, t in case.x.items()}
    # The same numbers in both: the difference is arithmetic's alone.
    exact.x = {n: t.double().requires_grad_() for n, t in low.items()}
    case.x = {n: t.requires_grad_() for n, t in low.items()}
    (out, after), (expected, after_expected) = (c.run(c.fresh()) for c in (case, exact))
    assert out.dtype == dtype
    assert all(t.dtype == torch.float32 for t in (*after.weights, *after.pending))
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert relative(out.double(), expected) < bound
    for found, reference in zip(after.weights, after_expected.weights, strict=True):
        assert relative(found.double(), reference) < bound
    grads = gradients(out.double().square().sum(), case.x)
    expected_grads = gradients(expected.square().sum(), exact.x)
    for name, grad in grads.items():
        assert grad.dtype == case.x[name].dtype
        assert relative(grad.double(), expected_grads[name]) < 3 * bound, name


def test_small_updates_survive_bf16_operands():
    """Updates far below a weight's bf16 spacing vanish in a bf16 state; in float32 they add up."""
    case = make_case("linear", 1, 1, 256, d=8, C=1)
    with torch.no_grad():
        case.x["eta"].fill_(2e-5)
    low = {n: t.detach().float() for n, t in case.x.items()}
    low |= {n: low[n].bfloat16() for n in "qkv"}
    exact = {n: t.double() for n, t in low.items()}
    changes = []
    for x in (low, exact):
        case.x = x
        start = case.fresh()
        _, after = case.run(start)
        changes.append((after.W1 - start.W1).double())
    # Rounding of single contributions (2^-9 each, of random sign), not of the sum.
    assert relative(changes[0], changes[1]) < 1e-2


def test_autocast_does_not_reach_the_inner_loop():
    case = make_case("mlp", 1, 2, 11, dtype=torch.float32)
    expected, _ = case.run(case.fresh())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, after = case.run(case.fresh())
    assert torch.equal(out, expected)
    assert after.W1.dtype == torch.float32


def test_shapes_on_the_meta_device():
    case = make_case("mlp", 2, 2, 11)
    case.x = {n: t.detach().to("meta") for n, t in case.x.items()}
    out, state = case.run(case.fresh())
    out, state = case.run(state)
    assert out.shape == case.x["q"].shape
    assert state.W2.shape == (2, 2, 18, 6)


def test_ops_import_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import ttt_dist.ops;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(*new - set(sys.stdlib_module_names))"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert set(found.stdout.split()) <= {"ttt_dist", "torch"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 2, 4, 6)}, r"k has shape \[2, 2, 4, 6\], expected \[2, 2, 5, 6\]"),
        ({"v": (2, 2, 5, 7)}, r"v has shape \[2, 2, 5, 7\], expected \[2, 2, 5, 6\]"),
        ({"eta": (2, 2, 5, 1)}, r"eta has shape \[2, 2, 5, 1\], expected \[2, 2, 5\]"),
        ({"ln_weight": (6,)}, r"ln_weight has shape \[6\], expected \[2, 6\]"),
        ({"q": (2, 2, 0, 6)}, r"q has shape \[2, 2, 0, 6\], expected .* every size at least 1"),
        ({"q": (2, 2, 6)}, r"q has shape \[2, 2, 6\], expected \[B, H, L, d\]"),
        ({"q": (3, 2, 5, 6)}, r"state.W1 has shape \[2, 2, 6, 18\], expected \[3, 2, 6, 18\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    case = make_case("mlp", 2, 2, 5)
    state = case.fresh()
    case.x |= {n: torch.zeros(shape, dtype=torch.float64) for n, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        case.run(state)


def test_all_mistakes_in_one_message():
    case = make_case("mlp", 2, 2, 5)
    case.x["k"] = case.x["k"].float()
    case.x["v"] = case.x["v"][:1]
    with pytest.raises(ValueError, match="ttt_mlp: ") as caught:
        case.run(case.fresh(), mini_batch_size=0, inner_eps=0.0, checkpoint_group_size=-1)
    for part in (
        "k is torch.float32, expected torch.float64",
        "v has shape [1, 2, 5, 6], expected [2, 2, 5, 6]",
        "mini_batch_size is 0, expected at least 1",
        "inner_eps is 0.0",
        "checkpoint_group_size is -1",
    ):
        assert part in str(caught.value)


def test_wrong_dtype_device_or_state():
    case = make_case("mlp", 2, 2, 5)
    linear = make_case("linear", 2, 2, 5)
    with pytest.raises(ValueError, match=r"state has 1 inner layer\(s\), expected 2"):
        case.run(linear.fresh())
    with pytest.raises(ValueError, match=r"state.W1 is torch.float32, expected torch.float64"):
        case.run(make_case("mlp", 2, 2, 5, dtype=torch.float32).fresh())
    with pytest.raises(ValueError, match="eta is on meta, expected cpu"):
        OPS["mlp"](
            *(case.x[n].to("meta") if n == "eta" else case.x[n] for n in FRAMES),
            case.x["ln_weight"],
            case.x["ln_bias"],
            case.fresh(),
            mini_batch_size=4,
        )
    case.x |= {n: case.x[n].half() for n in "qkv"}
    with pytest.raises(ValueError, match=r"q is torch.float16, expected one of torch.bfloat16"):
        case.run(case.fresh())


def test_state_remembers_its_mini_batch_size():
    case = make_case("mlp", 2, 2, 5)
    _, state = case.run(case.fresh())
    with pytest.raises(ValueError, match="mini_batch_size is 8, expected 4"):
        case.run(state, mini_batch_size=8)


def test_parameters_of_a_state_are_checked():
    t = torch.zeros
    with pytest.raises(ValueError, match=r"W2 has shape \[2, 9, 6\], expected \[2, 8, 6\]"):
        mlp_state(t(2, 6, 8), t(2, 1, 8), t(2, 9, 6), t(2, 1, 6), 1)
    with pytest.raises(ValueError, match=r"W1 has shape \[2, 6, 8\], expected \[2, 6, 6\]"):
        linear_state(t(2, 6, 8), t(2, 1, 6), 1)
    with pytest.raises(ValueError, match=r"b1 is torch\.float64 on cpu"):
        linear_state(t(2, 6, 6), t(2, 1, 6).double(), 1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        linear_state(t(2, 6, 6), t(2, 1, 6), 0)
    with pytest.raises(AttributeError, match="no second layer"):
        _ = linear_state(t(2, 6, 6), t(2, 1, 6), 1).W2
    assert mlp_state(*(x.bfloat16() for x in (t(2, 6, 8), t(2, 1, 8), t(2, 8, 6), t(2, 1, 6))), 3)


def test_rope_rotates_pairs_by_position():
    """Lengths are kept, position 0 is the identity, and products depend on distances alone."""
    cos, sin = rope_table(8, 16)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=g, dtype=torch.float64)

    def at(x, position):
        return apply_rope(x, cos, sin, torch.tensor([position]))

    assert torch.equal(at(q, 0), q)
    assert torch.equal(at(q, 16), q)  # modulo the mini-batch
    torch.testing.assert_close(at(q, 7).norm(), q.norm())
    torch.testing.assert_close((at(q, 9) * at(k, 4)).sum(), (at(q, 7) * at(k, 2)).sum())
    # The second pair at base 10000, d 8: angle 5 · 10000^(-2/8) = 0.5.
    pair = at(torch.eye(8, dtype=torch.float64)[2].view(1, 1, 1, 8), 5)[0, 0, 0, 2:4]
    expected = torch.tensor([math.cos(0.5), math.sin(0.5)], dtype=torch.float64)
    torch.testing.assert_close(pair, expected)


def test_rope_positions_per_lane():
    cos, sin = rope_table(6, 4)
    x = torch.randn(2, 3, 5, 6)
    positions = stream_positions(torch.tensor([0, 3]), 5)
    assert positions.tolist() == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]
    both = apply_rope(x, cos, sin, positions)
    for lane in range(2):
        alone = apply_rope(x[lane : lane + 1], cos, sin, positions[lane])
        assert torch.equal(both[lane : lane + 1], alone)


def test_rope_dtypes_and_errors():
    cos, sin = rope_table(6, 4)
    x = torch.randn(2, 3, 5, 6)
    positions = torch.arange(5)
    assert apply_rope(x.double(), cos, sin, positions).dtype == torch.float64
    low = apply_rope(x.bfloat16(), cos, sin, positions)
    # Computed in float32 and rounded once.
    assert torch.equal(low, apply_rope(x.bfloat16().float(), cos, sin, positions).bfloat16())
    with pytest.raises(ValueError, match=r"positions has shape \[4\], expected \[5\] or \[2, 5\]"):
        apply_rope(x, cos, sin, torch.arange(4))
    with pytest.raises(ValueError, match=r"expected \[C, 4\] for a head_dim of 8"):
        apply_rope(torch.randn(2, 3, 5, 8), cos, sin, positions)
    with pytest.raises(ValueError, match="head_dim is 5"):
        rope_table(5, 4)
    with pytest.raises(ValueError, match="mini_batch_size is 0"):
        rope_table(6, 0)
