"""TTT-MLP: the inner network is `f(x) = gelu(x W1 + b1) W2 + b2`, or has 3 to 5 such layers."""

from __future__ import annotations

from torch import Tensor

from ttt_dist.ops.checks import ScanArguments
from ttt_dist.ops.dual_form import differentiated_segments
from ttt_dist.ops.scan import scan
from ttt_dist.ops.state import DEEP_MLP_LAYERS, InnerState


def ttt_mlp(
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
    """Read every token from an inner MLP that learns from the tokens as they come.

    With `l_j(W) = ½‖LN(f(k_j; W)) - (v_j - k_j)‖²` and `W_s` the weights at the start of token i's
    mini-batch, `out_i = q_i + LN(f(q_i; W_s - Σ_{j ≤ i} η_j ∇l_j(W_s)))`, the sum over tokens of
    the same mini-batch (with `causal=False` over all of them). The next mini-batch starts from
    `W_s` minus the whole sum. Source: arXiv 2407.04620; `causal=False` is the form of TTT-Video,
    arXiv 2504.05298.

    A sequence may be fed in any split of lengths while carrying the state (`causal=False`: at
    mini-batch borders); the result is that of one call. Differentiable in all tensors, those of the
    initial and of the returned state included.

    The state's depth chooses the path. Two layers run as one operator with a hand-written backward,
    in tensor code on any device, and on CPUs, where all tensors are float32 or float64, by C++
    kernels (`ttt_dist.ops.native`).
    Three to five run by autograd through the same dual form, with a gradient checkpoint a group:
    slower, and under activation checkpointing, which can't keep their outputs, their forward is
    computed three times a step instead of twice. The contract is the same.

    Padding: the frames at the end of a lane whose `eta` is exactly 0 in all heads are no part of
    the stream. They leave the weights and what is pending untouched and don't advance the offset,
    even where they fill up a mini-batch; a lane of zeros comes back unchanged. They must be finite,
    and their outputs carry no meaning. (A zero with a non-zero after it is an ordinary token.)

    Args:
        q, k, v: `[B, H, L, d]`, any `L ≥ 1`; bfloat16, float32 or float64, the same for all.
            Operands of matrix products take this dtype.
        eta: `[B, H, L]`, inner learning rate of each token with all factors applied, the nominal
            `1 / mini_batch_size` included. Dtype of the state, or q's.
        ln_weight, ln_bias: `[H, d]`, per-head inner LayerNorm. Dtype of the state, or q's.
        state: of `mlp_state` or `deep_mlp_state`, or as returned by the call before. float32
            (float64 where q is), as are inner LayerNorm and losses.
        mini_batch_size: C, tokens that share their start weights; the same over a stream.
        causal: False lets a token read from later ones of its mini-batch.
        inner_eps: of the inner LayerNorm.
        checkpoint_group_size: mini-batches that the backward computes once more together; only
            the state between such groups is kept. None takes about the square root of their number,
            which needs the least memory; 0 makes a single group (with three layers or more: keeps
            everything, and computes nothing again).
        compiled: elementwise parts of tensor code are compiled by `torch.compile` at the first call
            of its shape (static; one mini-batch and one slab of them). For 2 layers. C++ kernels
            have nothing left to compile.

    Returns:
        `[B, H, L, d]` in q's dtype, and the state after the last frame.

    Raises:
        ValueError: shapes, dtypes or devices don't fit, `L` is 0, the state is another op's or was
            carried with another `mini_batch_size`, `causal=False` meets a started mini-batch, or
            `compiled` is asked for with 3 layers or more.
    """
    settings = (mini_batch_size, causal, inner_eps, checkpoint_group_size)
    given = ScanArguments(q, k, v, eta, ln_weight, ln_bias, state, *settings)
    if state.depth in DEEP_MLP_LAYERS:
        segments = differentiated_segments
        return scan("ttt_mlp", state.depth, given, compiled=compiled, segments=segments)
    return scan("ttt_mlp", 2, given, compiled=compiled)
