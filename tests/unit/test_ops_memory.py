"""What the scan allocates and keeps: linear in the length, near its square root between groups, and
no reads of device values by the host."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.ops_cases import OPS, gradients, make_case, objective
from ttt_dist.ops import scan_op
from ttt_dist.ops.dual_form import dual_form

pytestmark = pytest.mark.usefixtures("either_code")


class Recorder(TorchDispatchMode):
    """Bytes that operators allocate, and reads of device values by the host; the scan's own
    operators are looked into."""

    def __init__(self):
        super().__init__()
        self.bytes, self.host_reads, self.scans = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (scan_op.SCAN, scan_op.SCAN_BACKWARD):
            self.scans += 1
            inputs = scan_op._inputs(args[:14])
            with self, torch.no_grad():
                code = scan_op._implementation(inputs)
                return (code.forward if func == scan_op.SCAN else code.backward)(inputs, *args[14:])
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.host_reads += 1
        if not func.is_view and not func._schema.is_mutable:
            tensors = out if isinstance(out, (list, tuple)) else [out]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
        return out


def record(inner, L, group_size, carried, twin=False):
    """One step, forward and backward."""
    case = make_case(inner, 1, 1, L, d=8, C=4, checkpoint_group_size=group_size)
    state = case.fresh()
    if carried:
        _, state = case.run(state, 0, 3)
    op = dual_form if twin else OPS[inner]
    with Recorder() as recorder:
        out, after = case.run(state, op=op)
        (out.sum() + sum(w.sum() for w in after.weights + after.pending)).backward()
    assert recorder.scans == (0 if twin else 2)
    return recorder


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize(("group_size", "twin"), [(None, False), (0, False), (0, True), (16, True)])
@pytest.mark.parametrize("carried", [False, True])
def test_no_quadratic_memory_traffic(inner, group_size, twin, carried):
    """All bytes allocated in forward and backward grow as L: four times at 4 L. Indexing `x[i]` in
    the loop allocates a full-length gradient a step: 10 and more for mini-batches."""
    short, long = (record(inner, L, group_size, carried, twin).bytes for L in (128, 512))
    assert long / short < 4.3


def saved_bytes(L, group_size, twin=False):
    case = make_case("mlp", 1, 1, L, d=8, C=4, checkpoint_group_size=group_size)
    state = case.fresh()
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, _ = case.run(state, op=dual_form if twin else None)
        seen_at_end = dict(seen)  # storages alive: their addresses are distinct
    del out
    return sum(seen_at_end.values())


def test_saved_states_grow_as_the_square_root():
    """One more state a group: 16 times the length, 4 times the states, inputs aside."""

    def states(L):
        return saved_bytes(L, None) - saved_bytes(L, 0)

    # The single group of `0` keeps one state: n groups keep n - 1 more.
    assert states(4096) / states(256) == pytest.approx((43 - 1) / (11 - 1))


def test_twin_keeps_group_borders_only():
    """Nothing inside a group is kept: a tenth of what the plain scan keeps, at 16 mini-batches."""
    assert saved_bytes(512, 16, twin=True) < 0.1 * saved_bytes(512, 0, twin=True)
    assert saved_bytes(512, 0, twin=True) / saved_bytes(128, 0, twin=True) < 4.3


def test_no_states_are_kept_without_gradients():
    """Sixteen groups keep fifteen states more than the first; without gradients there are none."""
    case = make_case("mlp", 1, 1, 1024, d=8, C=4)
    allocated = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), Recorder() as recorder:
            case.run(case.fresh())
        allocated.append(recorder.bytes)
    state = sum(case.x[n].nbytes for n in ("W1", "b1", "W2", "b2"))
    assert allocated[0] - allocated[1] > 14 * state


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("length", [1, 3, 11])
def test_the_host_never_waits_for_the_device(inner, length):
    case = make_case(inner, 2, 2, length)
    with Recorder() as recorder:
        _, state = case.run(case.fresh())
        out, after = case.run(state)
        objective(out, after).backward()
    assert recorder.host_reads == 0


def live_objects():
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(issubclass(type(o), torch.Tensor) for o in objects)


def test_nothing_is_left_behind_by_a_call():
    """Not one tensor, and no more Python objects, over repeated calls forward and backward."""
    case = make_case("mlp", 1, 2, 19)

    def step():
        out, after = case.run(case.fresh())
        gradients(objective(out, after), case.x)

    for _ in range(3):
        step()
    objects, tensors = live_objects()
    for _ in range(20):
        step()
    objects_after, tensors_after = live_objects()
    assert tensors_after == tensors
    # Less than one object a step: the interpreter's own come and go.
    assert objects_after - objects < 20
