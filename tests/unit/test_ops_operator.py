"""The scan as an operator: checked by torch, kept by selective checkpointing, opaque to compilers,
counted in FLOPs."""

from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.ops_cases import FRAMES, OPS, gradients, make_case, objective, relative
from ttt_dist.ops import SAVED_OPS
from ttt_dist.ops.inner_loss import InnerLoss
from ttt_dist.ops.scan_op import SCAN, SCAN_BACKWARD
from ttt_dist.ops.state import InnerState


def operator_arguments(inner, carried, dtype=torch.float64, compiled=False):
    """As the driver calls it: expanded initial weights, or carried ones with pending parts."""
    case = make_case(inner, 2, 2, 11, dtype=dtype)
    state = case.fresh()
    frames = [case.x[n] for n in (*FRAMES, "ln_weight", "ln_bias")]
    pending = []
    if carried:
        _, state = case.run(state, 0, 7)
        state = state.detach().map(torch.clone)
        weights = [w.requires_grad_() for w in state.weights]
        pending = [p.requires_grad_() for p in state.pending]
    else:
        weights = [w.detach().clone().requires_grad_() for w in state.weights]
    end = torch.tensor([11, 6])
    return (*frames, weights, pending, end, 4, True, 1e-6, 2, compiled)


def check_operators(args):
    """Schema (nothing aliased, nothing mutated), fake tensors, autograd registration, AOT."""
    torch.library.opcheck(SCAN, args)
    with torch.no_grad():
        out, weights, borders = SCAN(*args)
    backward = (*args, borders, torch.randn_like(out), [torch.randn_like(w) for w in weights])
    # No second derivatives: what is checked of autograd is that they are refused.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(SCAN_BACKWARD, backward, test_utils=tests)


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_checks_the_operators(inner, carried, dtype):
    args = operator_arguments(inner, carried, torch.float32)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in args[:3])
    check_operators((q, k, v, *args[3:]))


def mini_batches_computed(monkeypatch, run):
    """How many mini-batches are computed forward while `run()` runs: each of them takes the
    gradient of its inner loss once."""
    computed = []
    original = InnerLoss.gradient

    def gradient(self, *args):
        computed.append(1)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(InnerLoss, "gradient", gradient)
        grads = run()
    return len(computed), grads


def keep_scans(ctx, func, *args, **kwargs):
    if func in SAVED_OPS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.usefixtures("tensor_code")  # its calls can be counted
@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("carried", [False, True])
def test_at_most_two_forwards_a_step(monkeypatch, inner, carried):
    """A checkpointed layer computes every mini-batch in forward, and once more, group by group, in
    backward; where the checkpoint doesn't know the operator, a third time."""
    case = make_case(inner, 2, 2, 32)
    state = case.fresh()
    if carried:
        _, state = case.run(state, 0, 7)
        state = state.detach()

    def layer(*_):
        out, after = case.run(state)
        return objective(out * 2.0, after)

    def step(**settings):
        value = checkpoint(layer, *case.x.values(), use_reentrant=False, **settings)
        names = FRAMES if carried else case.x
        return gradients(value, {n: case.x[n] for n in names})

    n = -(-(32 + 3) // 4) if carried else 8
    contexts = partial(create_selective_checkpoint_contexts, keep_scans)
    plain, expected = mini_batches_computed(
        monkeypatch,
        lambda: gradients(layer(), {m: case.x[m] for m in (FRAMES if carried else case.x)}),
    )
    assert plain == 2 * n
    selective, grads = mini_batches_computed(monkeypatch, lambda: step(context_fn=contexts))
    assert selective == 2 * n
    unaware, grads_unaware = mini_batches_computed(monkeypatch, step)
    assert unaware == 3 * n
    for name, grad in expected.items():
        assert torch.equal(grads[name], grad)
        assert torch.equal(grads_unaware[name], grad)


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("carried", [False, True])
def test_compiled_around_the_operator(inner, carried):
    """One graph, no breaks; the same kernels run inside: 1e-12 for what is fused around them."""
    case = make_case(inner, 2, 2, 11)
    state = case.fresh()
    if carried:
        _, state = case.run(state, 0, 7)
        state = state.detach()
    names = FRAMES if carried else tuple(case.x)

    def call(frames, norms, state):
        out, after = OPS[inner](*frames, *norms, state, mini_batch_size=4)
        return out, after.weights, after.pending, after.offset

    def run(function):
        frames = [case.x[n] for n in FRAMES]
        start = state if carried else case.fresh()
        out, weights, pending, offset = function(
            frames, (case.x["ln_weight"], case.x["ln_bias"]), start
        )
        after = InnerState(weights, pending, offset, 4)
        return out, gradients(objective(out, after), {n: case.x[n] for n in names})

    out, grads = run(call)
    compiled_out, compiled_grads = run(torch.compile(call, backend="aot_eager", fullgraph=True))
    assert relative(compiled_out, out) < 1e-12
    for name, grad in grads.items():
        assert relative(compiled_grads[name], grad) < 1e-12, name


@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_fake_tensors_give_shapes_and_gradients(inner):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        case = make_case(inner, 2, 2, 3)
        case.x = {
            n: mode.from_tensor(t.detach()).requires_grad_()
            for n, t in make_case(inner, 2, 2, 11).x.items()
        }
        out, after = case.run(case.fresh())
        out, after = case.run(after)
        grads = gradients(out.sum() + after.W1.sum(), case.x)
    assert out.shape == (2, 2, 11, 6)
    assert after.W1.shape == (2, *case.x["W1"].shape)
    assert all(grads[n].shape == t.shape for n, t in case.x.items())


@pytest.mark.usefixtures("tensor_code")  # its products can be counted
@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_flops_are_those_of_the_products(inner):
    """Counted by the formula, and by torch inside the operator's code: biases, which ride along as
    one more row of d or h, make the difference."""
    B, H, L, d, C = 1, 2, 64, 32, 8
    case = make_case(inner, B, H, L, d=d, C=C)
    args = [case.x[n] for n in (*FRAMES, "ln_weight", "ln_bias")]
    weights = list(case.fresh().weights)
    args += [weights, [], torch.tensor([L]), C, True, 1e-6, 3, False]
    with FlopCounterMode(display=False) as formula, torch.no_grad():
        out, after, borders = SCAN(*args)
        forward = formula.get_total_flops()
        grads = [torch.randn_like(w) for w in after]
        SCAN_BACKWARD(*args, borders, torch.randn_like(out), grads)
    backward = formula.get_total_flops() - forward

    from ttt_dist.ops.grouped_scan import scan_backward, scan_forward
    from ttt_dist.ops.scan_op import _inputs

    with FlopCounterMode(display=False) as real, torch.no_grad():
        scan_forward(_inputs(args))
        real_forward = real.get_total_flops()
        scan_backward(_inputs(args), borders, torch.randn_like(out), grads)
    real_backward = real.get_total_flops() - real_forward
    bias = 1 + 1.5 / d
    assert forward <= real_forward <= forward * bias
    # Backward's recomputation leaves out the two updates of weights that nothing reads: those after
    # each of the three groups.
    unread = 3 * 2 * 2 * C * d * case.x["W1"].shape[-1] * H if inner == "mlp" else 0
    assert backward - unread <= real_backward <= backward * bias - unread


@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_second_derivatives_are_refused(inner):
    case = make_case(inner, 1, 1, 9)
    out, after = case.run(case.fresh())
    (grad,) = torch.autograd.grad(objective(out, after), case.x["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative of its own"):
        grad.square().sum().backward()
