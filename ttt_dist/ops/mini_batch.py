"""One mini-batch of the inner loop in its dual form, for an inner network of any depth.

The inner network is `depth` linear maps with tanh-GELU between them: TTT-Linear has one, TTT-MLP
two. The update of layer `l` is always (its inputs)ᵀ (its output gradients), so the same lines serve
both. Formulas: Learning to (Learn at Test Time), arXiv 2407.04620, section 2.5 and appendix A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, ...]  # (W1, b1, W2, b2, ...)


@dataclass(frozen=True)
class InnerNorm:
    """Per-head LayerNorm of the inner loss: `weight`, `bias` `[H, 1, d]` in the compute dtype."""

    weight: Tensor
    bias: Tensor
    eps: float

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised `x` over its last dim, and the factor `(var + eps)^-1/2` that did it."""
        centred = x - x.mean(-1, keepdim=True)
        inv_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return centred * inv_std, inv_std

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight * self.normalise(x)[0] + self.bias


@dataclass(frozen=True)
class TokenGradients:
    """What the tokens of a mini-batch contribute to the weights, kept factored.

    Layer `l` changes by `inputs[l]ᵀ grads[l]`, its bias by the sum of `grads[l]` over tokens; both
    are `[B, H, C, width]`, `grads` with the inner learning rate applied.
    """

    inputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def gelu_derivative(x: Tensor) -> Tensor:
    """Derivative of `gelu` (constants sqrt(2/pi) and 0.044715)."""
    scale, cubic = math.sqrt(2.0 / math.pi), 0.044715
    squared = x * x
    t = torch.tanh(scale * x * (1.0 + cubic * squared))
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (scale * (1.0 + 3.0 * cubic * squared))


def product(a: Tensor, b: Tensor, operand: torch.dtype, result: torch.dtype) -> Tensor:
    """`a @ b` with operands cast to `operand` (the GPU's fast dtype) and the result to `result`."""
    return (a.to(operand) @ b.to(operand)).to(result)


def scores(a: Tensor, b: Tensor, operand: torch.dtype, result: torch.dtype, causal: bool) -> Tensor:
    """`a bᵀ + 1` `[..., C, C]`, lower triangle only where causal; the one stands for the bias."""
    full = product(a, b.mT, operand, result) + 1.0
    return full.tril() if causal else full


def network(weights: Weights, k: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of every linear map of `f(k)`, first to last, `[B, H, C, width]`.

    Args:
        weights: `(W1, b1, …)` `[B, H, …]` or `[H, …]`, compute dtype.
        k: `[B, H, C, d]`, any dtype: that of the matrix products' operands.
    """
    inputs = [k]
    hidden: list[Tensor] = []
    for layer in range(len(weights) // 2):
        if layer:
            inputs.append(gelu(hidden[-1]))
        W, b = weights[2 * layer], weights[2 * layer + 1]
        hidden.append(product(inputs[-1], W, k.dtype, W.dtype) + b)
    return inputs, hidden


def token_gradients(
    weights: Weights, k: Tensor, v: Tensor, eta: Tensor, norm: InnerNorm
) -> TokenGradients:
    """Gradients of the inner losses `½‖LN(f(k_j)) - (v_j - k_j)‖²`, all at `weights`.

    Args:
        weights: `(W1, b1, …)` `[B, H, …]`, compute dtype.
        k, v: `[B, H, C, d]`, any dtype: that of the matrix products' operands.
        eta: `[B, H, C, 1]`, compute dtype.
    """
    operand, dtype = k.dtype, weights[0].dtype
    depth = len(weights) // 2
    target = v.to(dtype) - k.to(dtype)
    inputs, hidden = network(weights, k)

    x_hat, inv_std = norm.normalise(hidden[-1])
    error = norm.weight * x_hat + norm.bias - target
    a = error * norm.weight
    grad = inv_std * (
        a - a.mean(-1, keepdim=True) - x_hat * (a * x_hat).mean(-1, keepdim=True)
    )  # [B, H, C, d]
    grads = [grad]
    for layer in range(depth - 1, 0, -1):
        grad = product(grad, weights[2 * layer].mT, operand, dtype)
        grad = grad * gelu_derivative(hidden[layer - 1])
        grads.append(grad)
    return TokenGradients(tuple(inputs), tuple(eta * g for g in reversed(grads)))


def weight_changes(tokens: TokenGradients, operand: torch.dtype) -> Weights:
    """`Σ_j η_j ∇l_j` for `(W1, b1, …)`, `[B, H, …]`: the factored form multiplied out."""
    changes: list[Tensor] = []
    for x, g in zip(tokens.inputs, tokens.grads, strict=True):
        changes += [product(x.mT, g, operand, g.dtype), g.sum(-2, keepdim=True)]
    return tuple(changes)


def mini_batch_outputs(
    read: Weights, q: Tensor, tokens: TokenGradients, scores1: Tensor, norm: InnerNorm, causal: bool
) -> Tensor:
    """`q_i + LN(f(q_i; W_i))`, `[B, H, C, d]` in the compute dtype.

    Args:
        read: weights that the mini-batch's tokens have not touched yet (those of earlier calls
            in the same mini-batch have).
        scores1: `scores(q, k)`, `[B, H, C, C]`, which no weight enters.
    """
    operand, dtype = q.dtype, read[0].dtype
    x = y = q
    for layer, (x_k, g) in enumerate(zip(tokens.inputs, tokens.grads, strict=True)):
        if layer:
            x = gelu(y)
        a = scores(x, x_k, operand, dtype, causal) if layer else scores1
        W, b = read[2 * layer], read[2 * layer + 1]
        y = product(x, W, operand, dtype) + b - product(a, g, operand, dtype)
    return q.to(dtype) + norm(y)


def mini_batch_step(
    weights: Weights,
    pending: Weights | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    scores1: Tensor,
    complete: Tensor | None,
    norm: InnerNorm,
    causal: bool,
) -> tuple[Tensor, Weights, TokenGradients]:
    """Outputs of one mini-batch, the weights after it, and what its tokens contribute.

    Args:
        weights, pending: `(W1, b1, …)`; `pending` is what earlier calls' tokens of this very
            mini-batch contribute, None where there are none.
        q, k, v: `[B, H, C, d]`; eta `[B, H, C, 1]`; scores1 `[B, H, C, C]`.
        complete: `[B, 1, 1, 1]`, one in lanes whose mini-batch ends here, zero in lanes that stop
            inside it and keep their weights; None where no lane completes it.

    Returns:
        `[B, H, C, d]` in q's dtype; the next mini-batch's weights; the unmasked token gradients.
    """
    tokens = token_gradients(weights, k, v, eta, norm)
    read = weights if pending is None else minus(weights, pending)
    out = mini_batch_outputs(read, q, tokens, scores1, norm, causal).to(q.dtype)
    if complete is None:
        return out, weights, tokens
    # The mask goes on the token gradients, C rows, rather than on state-sized tensors.
    applied = TokenGradients(tokens.inputs, tuple(complete * g for g in tokens.grads))
    if pending is not None:
        weights = minus(weights, tuple(complete * p for p in pending))
    return out, minus(weights, weight_changes(applied, k.dtype)), tokens


def minus(weights: Weights, changes: Weights) -> Weights:
    """Weights after a descent by `changes`."""
    return tuple(w - c for w, c in zip(weights, changes, strict=True))
