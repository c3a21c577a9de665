"""The inner loss of every token at three sets of weights: what the inner loop learns, as a figure.

Figure 5 of "Learning to (Learn at Test Time)", arXiv 2407.04620.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_dist.ops.mini_batch import (
    InnerNorm,
    Weights,
    minus,
    network,
    token_gradients,
    weight_changes,
)
from ttt_dist.ops.scan_op import without_autocast
from ttt_dist.ops.state import InnerState, compute_dtype


@torch.no_grad()
def token_losses(
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: InnerState,
    initial: Weights,
    *,
    mini_batch_size: int,
    inner_eps: float = 1e-6,
) -> tuple[Tensor, Weights]:
    """`l_i(W) = ½‖LN(f(k_i; W)) - (v_i - k_i)‖²` of every token, at three sets of weights.

    They are `initial` (W0, the parameters), the weights that the token's mini-batch starts with
    (before its step), and those once its mini-batch is complete (after its step; of an unfinished
    last mini-batch, with what it has so far). One mini-batch at a time: beside the result, memory
    doesn't grow with `L`. Tokens of a lane's trailing padding have losses without meaning.

    Args:
        k, v, eta, ln_weight, ln_bias, mini_batch_size, inner_eps: as in `ttt_mlp`.
        state: what the tokens are read from, of any depth; fresh.
        initial: `(W1, b1, …)` `[B, H, …]` or `[H, …]`, the state's dtype.

    Returns:
        `[3, B, H, L]`, the state's dtype: at W0, before, after; and the weights after the last
        token, those of an unfinished mini-batch too.

    Raises:
        ValueError: a lane may stand inside a mini-batch.
    """
    if not state.fresh:
        raise ValueError("token_losses: the lanes' state must be at the border of a mini-batch")
    with without_autocast(k.device.type):
        dtype = compute_dtype(k.dtype)
        gamma, beta = (t.to(dtype).unsqueeze(-2) for t in (ln_weight, ln_bias))
        norm = InnerNorm(gamma, beta, inner_eps)
        eta = eta.to(dtype)[..., None]  # [B, H, L, 1]
        weights = state.weights
        losses = torch.empty(3, *k.shape[:3], dtype=dtype, device=k.device)
        for start in range(0, k.shape[2], mini_batch_size):
            part = slice(start, start + mini_batch_size)
            own_k, own_v = k[:, :, part], v[:, :, part]
            tokens = token_gradients(weights, own_k, own_v, eta[:, :, part], norm)
            stepped = minus(weights, weight_changes(tokens, k.dtype))
            for row, at in enumerate((initial, weights, stepped)):
                losses[row, :, :, part] = _losses(at, own_k, own_v, norm)
            weights = stepped
        return losses, weights


def _losses(weights: Weights, k: Tensor, v: Tensor, norm: InnerNorm) -> Tensor:
    """`[B, H, C]` of the tokens of one mini-batch."""
    _, hidden = network(weights, k)
    error = norm(hidden[-1]) - (v.to(hidden[-1].dtype) - k.to(hidden[-1].dtype))
    return 0.5 * error.square().sum(-1)
