"""The scan by torch's own autograd through the dual form: slow, general, and easy to check.

Same arguments and results as `ttt_mlp` and `ttt_linear`, which have a hand-written backward for one
layer and two. This is what those are compared with and timed against, and what `ttt_mlp` itself
runs where the inner network is deeper.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ttt_dist.ops.checks import ScanArguments
from ttt_dist.ops.mini_batch import InnerNorm, Weights, mini_batch_step, scores
from ttt_dist.ops.scan import Loop, Tokens, scan
from ttt_dist.ops.state import InnerState


def dual_form(
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
    checkpoint_group_size: int | None = 16,
) -> tuple[Tensor, InnerState]:
    """`ttt_mlp` or `ttt_linear` by autograd, as the state's depth has it.

    `checkpoint_group_size`: mini-batches of one gradient checkpoint; 0 keeps all activations, None
    takes about the square root of their number.
    """
    settings = (mini_batch_size, causal, inner_eps, checkpoint_group_size)
    given = ScanArguments(q, k, v, eta, ln_weight, ln_bias, state, *settings)
    return scan("dual_form", state.depth, given, segments=differentiated_segments)


def differentiated_segments(
    loop: Loop,
    tokens: Tokens,
    norm: InnerNorm,
    weights: Weights,
    pending: Weights | None,
    end: Tensor,
) -> tuple[Tensor, Weights]:
    """As `fused_segments`: group by group, by autograd."""
    L, C = tokens.length, loop.mini_batch_size
    full = L // C
    group_size = max(1, loop.group_for(full))
    groups = [min(group_size, full - start) for start in range(0, full, group_size)]
    lengths = [n * C for n in groups] + ([L % C] if L % C else [])
    borders = torch.arange(C, full * C + 1, C, device=end.device)
    completed = (end[:, None] >= borders).to(tokens.eta.dtype)  # [B, full]
    # No lane completes the shorter mini-batch at the end.
    masks: list[Tensor | None] = [*completed.split(groups, dim=1)]
    masks += [None] * (len(lengths) - len(groups))

    read = (tokens.q, tokens.k, tokens.v, tokens.eta, norm.weight, norm.bias)
    differentiable = (*read, *weights, *(pending or ()))
    checkpointed = (
        loop.group_size != 0
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in differentiable)
    )
    outs = []
    for piece, mask in zip(tokens.split(lengths), masks, strict=True):
        arguments = (loop, piece, norm, weights, pending, mask)
        if checkpointed:
            # Nothing in a group draws random numbers.
            out, weights = checkpoint(
                _group, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out, weights = _group(*arguments)
        outs.append(out)
        pending = None
    return torch.cat(outs, dim=2), weights


def _group(
    loop: Loop,
    tokens: Tokens,
    norm: InnerNorm,
    weights: Weights,
    pending: Weights | None,
    completed: Tensor | None,
) -> tuple[Tensor, Weights]:
    """Consecutive mini-batches, `completed` `[B, n]`; or one shorter one, where that is None."""
    n = 1 if completed is None else completed.shape[1]
    q_n, k_n, v_n, eta_n = (
        x.unflatten(2, (n, -1)) for x in (tokens.q, tokens.k, tokens.v, tokens.eta[..., None])
    )
    # [B, H, n, C, C]: independent of the state, so for all mini-batches at once.
    scores1 = scores(q_n, k_n, q_n.dtype, eta_n.dtype, loop.causal)
    masks: list[Tensor | None] = [None]
    if completed is not None:
        masks = [*completed[:, :, None, None, None].unbind(1)]
    outs = []
    steps = zip(*(x.unbind(2) for x in (q_n, k_n, v_n, eta_n, scores1)), masks, strict=True)
    for q_m, k_m, v_m, eta_m, scores_m, mask in steps:
        out, weights, _ = mini_batch_step(
            weights, pending, q_m, k_m, v_m, eta_m, scores_m, mask, norm, loop.causal
        )
        outs.append(out)
        pending = None
    return torch.cat(outs, dim=2), weights
