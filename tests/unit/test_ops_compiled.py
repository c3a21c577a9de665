"""The scan with compiled elementwise code: the same results, in the same places."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.unit.ops_cases import OPS, gradients, make_case, objective, relative
from tests.unit.test_ops_operator import check_operators, keep_scans, operator_arguments
from ttt_dist.ops import deep_mlp_state, ttt_mlp
from ttt_dist.ops.dual_form import dual_form
from ttt_dist.ops.pointwise import Compiled
from ttt_dist.ops.state import InnerState

pytestmark = [
    pytest.mark.integration,  # compiling takes a few seconds a shape
    pytest.mark.usefixtures("tensor_code"),  # C++ kernels have nothing left to compile
]
INNER = ["mlp", "linear"]
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}


def results(op, case, state, **settings):
    out, after = case.run(state, op=op, **settings)
    grads = gradients(objective(out, after), case.x)
    return {"out": out, **{n: t for n, t in after.tensors().items() if n != "offset"}, **grads}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_twin(inner, dtype):
    """Seven mini-batches in groups of three, a last shorter one, after a carried state: full and
    shorter slabs. Sums in other orders; operands of bfloat16 are rounded in code not compiled."""
    case = make_case(inner, 2, 2, 27, dtype=dtype, checkpoint_group_size=3)
    found = []
    for op, settings in ((OPS[inner], {"compiled": True}), (dual_form, {})):
        _, state = case.run(case.fresh(), 0, 6, op=op, **settings)
        found.append(results(op, case, state, **settings))
    fast, slow = found
    for name, expected in slow.items():
        assert expected.norm() > 0
        assert relative(fast[name], expected) < DTYPES[dtype], name


@pytest.mark.parametrize("inner", INNER)
def test_finite_differences(inner):
    case = make_case(inner, 2, 1, 7, d=3, C=3, checkpoint_group_size=2, compiled=True)

    def run(*tensors):
        case.x |= dict(zip(case.x, tensors, strict=True))
        out, after = case.run(case.fresh())
        return (out, *after.weights, *after.pending)

    assert torch.autograd.gradcheck(run, list(case.x.values()), fast_mode=True)


@pytest.mark.parametrize("inner", INNER)
def test_torch_checks_the_operators(inner):
    check_operators(operator_arguments(inner, True, torch.float32, compiled=True))


@pytest.mark.parametrize("inner", INNER)
def test_inside_checkpoints_and_compiled_code(inner):
    """The operator's own graphs are the same ones: so are all bits but those of code around."""
    case = make_case(inner, 2, 2, 11, compiled=True)

    def call(x):
        out, after = OPS[inner](
            *(x[n] for n in ("q", "k", "v", "eta", "ln_weight", "ln_bias")), case.fresh(),
            mini_batch_size=4, compiled=True,
        )  # fmt: skip
        return out, after.weights, after.pending, after.offset

    def run(function):
        out, weights, pending, offset = function(case.x)
        return gradients(objective(out, InnerState(weights, pending, offset, 4)), case.x)

    expected = run(call)
    contexts = partial(create_selective_checkpoint_contexts, keep_scans)
    kept = run(lambda x: checkpoint(call, x, use_reentrant=False, context_fn=contexts))
    compiled = run(torch.compile(call, backend="aot_eager", fullgraph=True))
    for name, value in expected.items():
        assert torch.equal(kept[name], value), name
        assert relative(compiled[name], value) < 1e-12, name


def test_a_shape_is_compiled_once(monkeypatch):
    """Shapes, not values or lengths, decide: a second scan, longer, compiles nothing."""
    case = make_case("mlp", 1, 3, 40, checkpoint_group_size=4, compiled=True)
    first = case.run(case.fresh(), 0, 24)[0]
    first.sum().backward()
    monkeypatch.setattr(torch._inductor, "compile", None)
    out, _ = case.run(case.fresh())
    out.sum().backward()
    assert torch.equal(out[:, :, :24], first)
    with pytest.raises(TypeError):
        Compiled(lambda x: x + 1.0)(torch.zeros(3))


def test_deeper_networks_are_refused():
    case = make_case("mlp", 1, 1, 8)
    W1, b1 = torch.zeros(1, 6, 6), torch.zeros(1, 1, 6)
    state = deep_mlp_state([W1.double()] * 3, [b1.double()] * 3, 1)
    with pytest.raises(ValueError, match="compiled is True, which a network of 3 layers has no"):
        case.run(state, op=ttt_mlp, compiled=True)
