"""TTT-Linear: the inner network is `f(x) = x W1 + b1`."""

from __future__ import annotations

from torch import Tensor

from ttt_dist.ops.checks import ScanArguments
from ttt_dist.ops.scan import scan
from ttt_dist.ops.state import InnerState


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: InnerState,
    *,
    mini_batch_size: int,
    causal: bool = True,
    inner_eps: float = 1e-6,
    checkpoint_group_size: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, InnerState]:
    """`ttt_mlp` with a linear inner network; `state` is that of `linear_state`.

    Arguments, returned values, padding and errors: see `ttt_mlp`.
    """
    settings = (mini_batch_size, causal, inner_eps, checkpoint_group_size)
    given = ScanArguments(q, k, v, eta, ln_weight, ln_bias, state, *settings)
    return scan("ttt_linear", 1, given, compiled=compiled)
