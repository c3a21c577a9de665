"""The definition of a TTT layer's inner loop, token by token: slow, and the oracle of the tests.

Primal form: the inner gradient is torch.autograd's gradient of the inner loss, each token's weights
are formed in full, lanes are looped over. It shares the state's layout with the fast ops and none
of their mathematics. Any inner depth: `f` is linear maps with tanh-GELU between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_dist.ops.state import InnerState


def inner_network(x: Tensor, weights: list[Tensor]) -> Tensor:
    """`f(x; W)` for `x` `[H, d]`; weights `[W1, b1, …]` as `[H, in, out]` and `[H, 1, out]`."""
    x = x[:, None]
    for i in range(0, len(weights), 2):
        if i > 0:
            x = F.gelu(x, approximate="tanh")
        x = x @ weights[i] + weights[i + 1]
    return x[:, 0]


def inner_norm(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float) -> Tensor:
    """Per-head LayerNorm, all arguments `[H, d]`; biased variance."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * ln_weight + ln_bias


def reference_scan(
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
) -> tuple[Tensor, InnerState]:
    """`ttt_mlp` and `ttt_linear` by definition; same arguments, no checkpointing, no casts.

    Outer gradients flow through the inner ones. Frames of a lane's trailing padding (eta exactly 0
    in all heads) read from the weights of the last frame before them.
    """
    outs, lanes = [], []
    for b in range(q.shape[0]):
        out, *lane = _lane(
            q[b].unbind(1),
            k[b].unbind(1),
            v[b].unbind(1),
            eta[b].unbind(1),
            lambda x: inner_norm(x, ln_weight, ln_bias, inner_eps),
            [w[b] for w in state.weights],
            [p[b] for p in state.pending],
            int(state.offset[b]),
            mini_batch_size,
            causal,
        )
        outs.append(out)
        lanes.append(lane)
    weights, pending, offsets = zip(*lanes, strict=True)
    return torch.stack(outs), InnerState(
        tuple(torch.stack(w) for w in zip(*weights, strict=True)),
        tuple(torch.stack(p) for p in zip(*pending, strict=True)),
        torch.tensor(offsets, device=q.device),
        mini_batch_size,
    )


def _lane(
    q: tuple[Tensor, ...],
    k: tuple[Tensor, ...],
    v: tuple[Tensor, ...],
    eta: tuple[Tensor, ...],
    norm: Callable[[Tensor], Tensor],
    weights: list[Tensor],
    pending: list[Tensor],
    offset: int,
    mini_batch_size: int,
    causal: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], int]:
    """One lane, `[H, d]` and `eta` `[H]` a frame; `[H, L, d]`, weights, pending, offset."""

    def read(query: Tensor) -> Tensor:
        current = [w - p for w, p in zip(weights, pending, strict=True)]
        return query + norm(inner_network(query, current))

    def learn(i: int) -> list[Tensor]:
        def loss(*at: Tensor) -> Tensor:
            error = norm(inner_network(k[i], list(at))) - (v[i] - k[i])
            return 0.5 * error.square().sum()

        gradients = _gradients(loss, weights)
        rate = eta[i][:, None, None]
        return [p + rate * g for p, g in zip(pending, gradients, strict=True)]

    length = max((i + 1 for i, e in enumerate(eta) if bool((e != 0).any())), default=0)
    outs = []
    start = 0
    while start < length:
        stop = min(start + mini_batch_size - offset, length)
        if not causal:
            for i in range(start, stop):
                pending = learn(i)
        for i in range(start, stop):
            if causal:
                pending = learn(i)
            outs.append(read(q[i]))
        offset += stop - start
        if offset == mini_batch_size:
            weights = [w - p for w, p in zip(weights, pending, strict=True)]
            pending = [torch.zeros_like(w) for w in weights]
            offset = 0
        start = stop
    outs += [read(query) for query in q[length:]]
    return torch.stack(outs, dim=1), weights, pending, offset


def _gradients(loss: Callable[..., Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of `loss(*weights)`, themselves differentiable where grad mode is on outside."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of its own, so that the gradient is with respect to this use of the weights.
        at = [w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in weights]
        return torch.autograd.grad(loss(*at), at, create_graph=create_graph)
