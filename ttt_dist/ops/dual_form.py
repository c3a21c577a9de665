"""The scan by torch's own autograd through the dual form: slow, general, and easy to check.

Same arguments and results as `ttt_mlp` and `ttt_linear`, which have a hand-written backward for one
layer and two. This is what those are compared with and timed against, and what `ttt_mlp` itself
runs where the inner network is deeper.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ttt_dist.ops.mini_batch import InnerNorm, Weights, mini_batch_step, scores
from ttt_dist.ops.scan import Loop, scan
from ttt_dist.ops.state import InnerState


def dual_form_mlp(
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
    """`ttt_mlp` by autograd.

    `checkpoint_group_size`: mini-batches of one gradient checkpoint; 0 keeps all activations, None
    takes about the square root of their number.
    """
    return scan(
        "dual_form_mlp",
        2,
        q,
        k,
        v,
        eta,
        ln_weight,
        ln_bias,
        state,
        mini_batch_size=mini_batch_size,
        causal=causal,
        inner_eps=inner_eps,
        checkpoint_group_size=checkpoint_group_size,
        segments=differentiated_segments,
    )


def dual_form_linear(
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
    """`ttt_linear` by autograd; see `dual_form_mlp`."""
    return scan(
        "dual_form_linear",
        1,
        q,
        k,
        v,
        eta,
        ln_weight,
        ln_bias,
        state,
        mini_batch_size=mini_batch_size,
        causal=causal,
        inner_eps=inner_eps,
        checkpoint_group_size=checkpoint_group_size,
        segments=differentiated_segments,
    )


def differentiated_segments(
    loop: Loop,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weights: Weights,
    pending: Weights | None,
    end: Tensor,
) -> tuple[Tensor, Weights]:
    """All mini-batches of a layout, group by group: outputs, and weights with completed ones."""
    L, C = q.shape[2], loop.mini_batch_size
    full = L // C
    group_size = max(1, loop.group_for(full))
    groups = [min(group_size, full - start) for start in range(0, full, group_size)]
    lengths = [n * C for n in groups] + ([L % C] if L % C else [])
    borders = torch.arange(C, full * C + 1, C, device=q.device)
    completed = (end[:, None] >= borders).to(eta.dtype)  # [B, full]
    # No lane completes the shorter mini-batch at the end.
    masks: list[Tensor | None] = [*completed.split(groups, dim=1)]
    masks += [None] * (len(lengths) - len(groups))

    differentiable = (q, k, v, eta, gamma, beta, *weights, *(pending or ()))
    checkpointed = (
        loop.group_size != 0
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in differentiable)
    )
    outs = []
    # Split once: indexing inside the loop would make each step's backward allocate a gradient of
    # the full length, O(L²) bytes in all.
    pieces = zip(*(x.split(lengths, dim=2) for x in (q, k, v, eta)), strict=True)
    for piece, mask in zip(pieces, masks, strict=True):
        arguments = (loop, *piece, gamma, beta, weights, pending, mask)
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weights: Weights,
    pending: Weights | None,
    completed: Tensor | None,
) -> tuple[Tensor, Weights]:
    """Consecutive mini-batches, `completed` `[B, n]`; or one shorter one, where that is None."""
    n = 1 if completed is None else completed.shape[1]
    norm = InnerNorm(gamma, beta, loop.eps)
    q_n, k_n, v_n, eta_n = (x.unflatten(2, (n, -1)) for x in (q, k, v, eta[..., None]))
    # [B, H, n, C, C]: independent of the state, so for all mini-batches at once.
    scores1 = scores(q_n, k_n, q.dtype, eta.dtype, loop.causal)
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
