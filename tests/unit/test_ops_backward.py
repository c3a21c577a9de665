"""The hand-written backward: finite differences, and its slow twin, which autograd differentiates,
over random shapes and values."""

import random

import pytest
import torch

from tests.unit.ops_cases import FRAMES, OPS, gradients, make_case, objective, relative
from ttt_dist.ops.dual_form import dual_form
from ttt_dist.ops.products import Products
from ttt_dist.ops.state import InnerState

INNER = ["mlp", "linear"]
pytestmark = pytest.mark.usefixtures("either_code")


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("carried", [False, True])
def test_gradcheck(inner, causal, carried):
    """Every input, the state that comes in and the one that goes out, by finite differences;
    float64, torch's own tolerances. Lanes end at different places, groups don't divide the whole,
    and a carried state stands at different offsets (at a border where not causal)."""
    case = make_case(inner, 2, 1, 7, d=3, C=3, causal=causal, checkpoint_group_size=2)
    with torch.no_grad():
        case.x["eta"][0, :, 5:] = 0
    padding = case.x["eta"].detach() == 0
    names = [n for n in case.x if n in (*FRAMES, "ln_weight", "ln_bias") or not carried]
    tensors = [case.x[n] for n in names]
    state = None
    if carried:
        before = make_case(inner, 2, 1, 6 if not causal else 5, d=3, C=3, seed=2, causal=causal)
        if causal:
            with torch.no_grad():
                before.x["eta"][1, :, 4:] = 0
        _, state = before.run(before.fresh())
        named = state.detach().tensors()
        offset = named.pop("offset")
        # Pending parts exist at a border too: a state may be put together from anything.
        named = {n: (t + 0.05).requires_grad_() for n, t in named.items()}
        tensors += named.values()

    def run(*tensors):
        case.x |= dict(zip(names, tensors, strict=False))
        # Finite differences must not turn padding into frames.
        case.x["eta"] = case.x["eta"].masked_fill(padding, 0.0)
        start = case.fresh()
        if state is not None:
            values = dict(zip(named, tensors[len(names) :], strict=True))
            start = InnerState.from_tensors(values | {"offset": offset}, 3)
        out, after = case.run(start)
        # A padded frame's output carries no meaning.
        return (out[0, :, :5], out[1], *after.weights, *after.pending)

    # Random projections of inputs and outputs rather than every pair of elements.
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


def random_problem(seed):
    """Shapes, values and settings drawn by a seed, in float64."""
    rng = random.Random(seed)
    inner = INNER[seed % 2]
    # Over 2 dims LayerNorm is all but a sign: it multiplies a last digit by 1/sqrt(eps) a step.
    B, H, d = rng.randint(1, 3), rng.randint(1, 3), rng.choice([1, 4, 5, 8, 16])
    C, L = rng.choice([1, 2, 3, 4, 5, 7, 16]), rng.randint(1, 40)
    causal = rng.random() < 0.7
    group = rng.choice([None, 0, 1, 2, 3, 5, 100])
    case = make_case(
        inner, B, H, L, d=d, C=C, seed=seed, causal=causal, checkpoint_group_size=group
    )
    with torch.no_grad():
        scale = rng.choice([1e-6, 1e-2, 1.0, 1.0, 1.0, 30.0])
        case.x[rng.choice("qkv")].mul_(scale)
        if rng.random() < 0.3:  # some or all inner learning rates are zero, inside and at the end
            case.x["eta"].mul_(torch.rand(B, 1, L, dtype=torch.float64) < rng.random())
        if rng.random() < 0.3:
            lane, end = rng.randrange(B), rng.randint(0, L)
            case.x["eta"][lane, :, end:] = 0
        case.x["eta"].mul_(rng.choice([1.0, 1.0, 0.1, 1e-6]))
    if rng.random() < 0.4:  # the layout of a projection's output: [B, L, H, d], transposed
        for n in "qkv":
            t = case.x[n].detach().transpose(1, 2).contiguous().transpose(1, 2)
            case.x[n] = t.requires_grad_()
    frozen = [n for n in case.x if rng.random() < 0.2]
    for n in frozen:
        case.x[n] = case.x[n].detach()
    fed = 0 if rng.random() < 0.5 else rng.randint(1, 2 * C) * (1 if causal else C)
    return case, fed


def results(case, fed, ops):
    """Outputs, the returned state and all gradients that are asked for, by each op."""
    found = []
    for op in ops:
        state = case.fresh()
        leaves = {n: t for n, t in case.x.items() if t.requires_grad}
        if fed:
            # The stream's past through the twin: both go on from the very same state.
            H, d = case.x["q"].shape[1], case.x["q"].shape[3]
            C = case.settings["mini_batch_size"]
            past = make_case(case.inner, case.batch_size, H, fed, d=d, C=C, seed=9)
            past.x |= {n: case.x[n] for n in case.x if n[0] in "Wb"}
            _, state = past.run(state, op=dual_form, causal=case.settings["causal"])
        out, after = case.run(state, op=op)
        value = objective(out, after)
        grads = {}
        if value.requires_grad:
            asked = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            grads = {f"grad {n}": g for n, g in zip(leaves, asked, strict=True) if g is not None}
        state_tensors = {n: t for n, t in after.tensors().items() if n != "offset"}
        found.append({"out": out} | state_tensors | grads)
    return found


@pytest.mark.parametrize("seed", range(120))
def test_equals_the_twin(seed):
    """1e-9 of a tensor's norm: other orders of sums, 1e-16 each, amplified where the inner loop is
    (a token normalised over few dims, or a large one, multiplies differences)."""
    case, fed = random_problem(seed)
    fast, slow = results(case, fed, (OPS[case.inner], dual_form))
    assert fast.keys() == slow.keys()
    # Gradients that cancel to nothing are compared with the largest of all.
    largest = max((t.norm() for n, t in slow.items() if n.startswith("grad ")), default=0.0)
    for name, expected in slow.items():
        assert expected.isfinite().all()
        error = (fast[name] - expected).norm()
        floor = 1e-13 * largest if name.startswith("grad ") else 1e-13
        assert error <= 1e-9 * expected.norm() + floor, name


@pytest.mark.parametrize("inner", INNER)
def test_two_calls_from_one_state(inner):
    """Gradients of both add up, also through a state that was carried."""
    case = make_case(inner, 2, 2, 21, checkpoint_group_size=2)
    found = []
    for op in (OPS[inner], dual_form):
        _, state = case.run(case.fresh(), 0, 6, op=op)
        first, after1 = case.run(state, 6, 15, op=op)
        second, after2 = case.run(state, 9, 21, op=op)
        value = objective(first, after1) + 2.0 * objective(second, after2, seed=5)
        found.append(gradients(value, case.x))
    assert all(relative(found[0][n], found[1][n]) < 1e-10 for n in case.x)


@pytest.mark.parametrize("inner", INNER)
def test_gradients_of_the_state_alone(inner):
    """Outputs unused: what autograd leaves undefined is zero."""
    case = make_case(inner, 2, 2, 11)
    found = []
    for op in (OPS[inner], dual_form):
        _, after = case.run(case.fresh(), op=op)
        value = after.W1.square().sum()
        grads = torch.autograd.grad(value, list(case.x.values()), allow_unused=True)
        found.append([torch.zeros(1) if g is None else g for g in grads])
    for fast, slow in zip(*found, strict=True):
        assert (fast - slow).norm() <= 1e-10 * slow.norm()


@pytest.fixture
def poisoned_memory():
    """New memory is NaN until something writes it: torch fills it where algorithms must be
    deterministic."""
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("fed", [0, 6])
@pytest.mark.parametrize("length", [8, 11, 23])
@pytest.mark.parametrize("group", [None, 1, 2, 100])
def test_every_element_is_written(poisoned_memory, inner, fed, length, group):
    assert torch.empty(3).isnan().all()
    case = make_case(inner, 2, 2, length, checkpoint_group_size=group)
    state = case.fresh()
    if fed:
        _, state = make_case(inner, 2, 2, fed, seed=3).run(state)
    out, after = case.run(state)
    grads = gradients(objective(out, after), case.x)
    for name, t in {"out": out, **after.tensors(), **grads}.items():
        assert t.isfinite().all(), name


@pytest.mark.parametrize("inner", INNER)
def test_bfloat16_operands_over_1024_steps(inner):
    """Against float32 on the very same numbers: operands are rounded to 2^-9, at every product of
    every step anew, and errors stay at one or two roundings; measured up to 5e-3."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(inner, 1, 1, 1024, d=16, C=1, dtype=torch.float32)
        # A model's sizes: keys and queries of length 1, the rate of 1 / d.
        case.x = {n: t.detach() for n, t in case.x.items()}
        for n in "qkv":
            t = case.x[n] if n == "v" else torch.nn.functional.normalize(case.x[n], dim=-1)
            case.x[n] = t.bfloat16().to(dtype)
        case.x["eta"] = case.x["eta"] / 16
        case.x = {n: t.requires_grad_() for n, t in case.x.items()}
        start = case.fresh()
        out, after = case.run(start)
        assert after.W1.dtype == torch.float32
        grads = gradients(out.float().square().mean(), case.x)
        changes = {f"change {n}": a - b for n, a, b in zip(
            ("W1", "b1", "W2", "b2"), after.weights, start.weights, strict=False)}  # fmt: skip
        results.append(
            {"out": out.float()} | changes | {f"grad {n}": g.float() for n, g in grads.items()}
        )
    exact, rounded = results
    errors = {n: relative(rounded[n], exact[n]) for n in exact}
    assert max(errors.values()) < 1e-2, errors


def test_biases_are_not_rounded():
    """Operands are bfloat16's, what stands for a bias stays float32's: 1e-6 for sums of 16."""
    products = Products(torch.bfloat16, torch.float32)
    g = torch.Generator().manual_seed(0)
    x, w, y = (torch.randn(2, *shape, generator=g) for shape in ((16, 5), (5, 8), (16, 8)))
    x[..., -1] = 1.0
    rounded = x[..., :-1].bfloat16().float() @ w[:, :-1].bfloat16().float()
    assert relative(products.mul(x, w, bias=True), rounded + w[:, -1:]) < 1e-6
    assert relative(products.add(y.clone(), x, w, bias=True), y + rounded + w[:, -1:]) < 1e-6
    changed = products.update(w.clone(), x.mT, y, alpha=-1.0)
    assert relative(changed[:, -1:], w[:, -1:] - y.sum(1, keepdim=True)) < 1e-6
    expected = x.mT.bfloat16().float() @ y.bfloat16().float()
    assert relative(changed[:, :-1], (w - expected)[:, :-1]) < 1e-6
