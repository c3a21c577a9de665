"""The state that a TTT scan carries along a stream: a plain bag of tensors, lanes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Layers of the inner MLP. Two have a hand-written backward; more run by autograd.
MLP_LAYERS = range(2, 6)
DEEP_MLP_LAYERS = range(3, 6)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state, inner LayerNorm and inner losses for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_names(depth: int) -> list[str]:
    """`["W1", "b1", "W2", "b2", ...]` of an inner network with `depth` linear maps."""
    return [f"{letter}{layer}" for layer in range(1, depth + 1) for letter in "Wb"]


@dataclass(frozen=True)
class InnerState:
    """Weights of the inner network of every lane and head, and the mini-batch in progress.

    A lane is one row of the batch, one stream of its own. Every tensor has the lanes as its first
    dim, so that a lane is reset with `torch.where` and saved by slicing. `W_in`, `W_out` below are
    the widths of a layer: `d → h → d` for TTT-MLP (`d → h → … → h → d` where it has more layers),
    `d → d` for TTT-Linear. `W1 b1 W2 b2` are properties; deeper layers are in `weights` and, by
    name, in `tensors()`.

    Attributes:
        weights: `(W1, b1, W2, b2, …)`, `W [B, H, W_in, W_out]`, `b [B, H, 1, W_out]`, float32 or
            float64: the weights with every *completed* mini-batch applied.
        pending: same shapes and order: `Σ_j η_j ∇l_j(weights)` over the tokens of the mini-batch in
            progress. Its tokens read `weights - pending`; once the mini-batch is complete, that is
            what `weights` becomes.
        offset: int64 `[B]` on the state's device, `0 ≤ offset < mini_batch_size`: how many tokens
            of the mini-batch in progress each lane has seen.
        mini_batch_size: what `offset` counts up to, once a scan has been run on the state. None
            marks a *fresh* state (no lane is inside a mini-batch, `offset` and `pending` zero), so
            that a scan knows it without asking the device.
    """

    weights: tuple[Tensor, ...]
    pending: tuple[Tensor, ...]
    offset: Tensor
    mini_batch_size: int | None = None

    @property
    def fresh(self) -> bool:
        """True where all lanes are known to be at the border of a mini-batch."""
        return self.mini_batch_size is None

    @classmethod
    def at_border(cls, weights: Sequence[Tensor]) -> InnerState:
        """Lanes with these `weights`, all at the border of a mini-batch: a fresh state."""
        # Expanded views: what isn't there takes no memory, however many lanes there are.
        pending = tuple(w.new_zeros(()).expand(w.shape) for w in weights)
        offset = torch.zeros(len(weights[0]), dtype=torch.int64, device=weights[0].device)
        return cls(tuple(weights), pending, offset)

    @property
    def depth(self) -> int:
        """Number of linear maps of the inner network: 1 for TTT-Linear, 2 to 5 for TTT-MLP."""
        return len(self.weights) // 2

    @property
    def W1(self) -> Tensor:  # noqa: N802
        """`[B, H, d, h]` (TTT-Linear: `[B, H, d, d]`), completed mini-batches applied."""
        return self.weights[0]

    @property
    def b1(self) -> Tensor:
        """`[B, H, 1, h]` (TTT-Linear: `[B, H, 1, d]`), completed mini-batches applied."""
        return self.weights[1]

    @property
    def W2(self) -> Tensor:  # noqa: N802
        """`[B, H, h, d]` (of 3 layers or more: `[B, H, h, h]`), completed mini-batches applied.

        TTT-Linear has none: AttributeError.
        """
        return self._second_layer(2)

    @property
    def b2(self) -> Tensor:
        """`[B, H, 1, d]` (of 3 layers or more: `[B, H, 1, h]`), completed mini-batches applied.

        TTT-Linear has none: AttributeError.
        """
        return self._second_layer(3)

    def _second_layer(self, index: int) -> Tensor:
        if self.depth < 2:
            raise AttributeError("a TTT-Linear state has W1 and b1 alone, no second layer")
        return self.weights[index]

    def detach(self) -> InnerState:
        """The same values, cut off from the graph that made them (truncated backpropagation)."""
        return self.map(torch.Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> InnerState:
        """`function` applied to every tensor (weights, pending and offset), the rest kept."""
        return replace(
            self,
            weights=tuple(function(t) for t in self.weights),
            pending=tuple(function(t) for t in self.pending),
            offset=function(self.offset),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: `W1 b1 … pending_W1 pending_b1 … offset`, e.g. for a checkpoint."""
        names = weight_names(self.depth)
        named = dict(zip(names, self.weights, strict=True))
        named |= {f"pending_{n}": t for n, t in zip(names, self.pending, strict=True)}
        named["offset"] = self.offset
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], mini_batch_size: int | None) -> InnerState:
        """Inverse of `tensors()`; `mini_batch_size` is that of the state that was taken apart.

        Raises:
            ValueError: names are missing or unknown.
        """
        depth = sum(name.startswith("W") for name in tensors)
        names = weight_names(depth)
        expected = {*names, *(f"pending_{n}" for n in names), "offset"}
        if depth == 0 or set(tensors) != expected:
            raise ValueError(f"a state has the tensors {sorted(expected)}, found {sorted(tensors)}")
        return cls(
            weights=tuple(tensors[n] for n in names),
            pending=tuple(tensors[f"pending_{n}"] for n in names),
            offset=tensors["offset"],
            mini_batch_size=mini_batch_size,
        )


def _fresh_state(parameters: Mapping[str, Tensor], batch_size: int) -> InnerState:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    first = parameters["W1"]
    problems = [
        f"{name} is {t.dtype} on {t.device}, expected a floating dtype, that of W1 "
        f"({first.dtype} on {first.device})"
        for name, t in parameters.items()
        if not t.is_floating_point() or t.dtype != first.dtype or t.device != first.device
    ]
    if problems:
        raise ValueError("; ".join(problems))
    dtype = compute_dtype(first.dtype)
    # Expanded views: a fresh state takes no memory of its own, however many lanes there are.
    return InnerState.at_border(
        [t.to(dtype).expand(batch_size, *t.shape) for t in parameters.values()]
    )


def _check_shapes(parameters: Mapping[str, Tensor], expected: Mapping[str, list[int]]) -> None:
    problems = [
        f"{name} has shape {list(t.shape)}, expected {expected[name]}"
        for name, t in parameters.items()
        if list(t.shape) != expected[name]
    ]
    if problems:
        raise ValueError("; ".join(problems))


def mlp_state(W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor, batch_size: int) -> InnerState:
    """Fresh TTT-MLP state (`f(x) = gelu(x W1 + b1) W2 + b2`) for `batch_size` lanes.

    Args:
        W1, b1, W2, b2: per head, `[H, d, h]`, `[H, 1, h]`, `[H, h, d]`, `[H, 1, d]`. All lanes
            start from them, and gradients reach them. float64 stays, all else becomes float32.
        batch_size: number of lanes, at least 1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, naming each tensor.
    """
    if W1.ndim != 3:
        raise ValueError(f"W1 has shape {list(W1.shape)}, expected [H, d, h]")
    H, d, h = W1.shape
    parameters = {"W1": W1, "b1": b1, "W2": W2, "b2": b2}
    _check_shapes(parameters, {"W1": [H, d, h], "b1": [H, 1, h], "W2": [H, h, d], "b2": [H, 1, d]})
    return _fresh_state(parameters, batch_size)


def deep_mlp_state(
    weights: Sequence[Tensor], biases: Sequence[Tensor], batch_size: int
) -> InnerState:
    """Fresh state of a TTT-MLP with 3 to 5 layers, tanh-GELU between them, for `batch_size` lanes.

    Args:
        weights: per head, first to last: `[H, d, h]`, then `[H, h, h]`, the last `[H, h, d]`.
        biases: as many, `[H, 1, h]`, the last `[H, 1, d]`; see `mlp_state`.
        batch_size: number of lanes, at least 1.

    Raises:
        ValueError: another number of layers (`mlp_state` makes those of two), or shapes, dtypes or
            devices do not fit, naming each tensor.
    """
    depth = len(weights)
    if depth not in DEEP_MLP_LAYERS or len(biases) != depth:
        raise ValueError(
            f"found {depth} weights and {len(biases)} biases, expected as many of both, "
            f"{DEEP_MLP_LAYERS[0]} to {DEEP_MLP_LAYERS[-1]} (mlp_state takes two)"
        )
    W1 = weights[0]
    if W1.ndim != 3:
        raise ValueError(f"W1 has shape {list(W1.shape)}, expected [H, d, h]")
    H, d, h = W1.shape
    widths = [d, *[h] * (depth - 1), d]
    parameters: dict[str, Tensor] = {}
    expected: dict[str, list[int]] = {}
    for i, (W, b) in enumerate(zip(weights, biases, strict=True)):
        parameters |= {f"W{i + 1}": W, f"b{i + 1}": b}
        expected[f"W{i + 1}"] = [H, widths[i], widths[i + 1]]
        expected[f"b{i + 1}"] = [H, 1, widths[i + 1]]
    _check_shapes(parameters, expected)
    return _fresh_state(parameters, batch_size)


def linear_state(W1: Tensor, b1: Tensor, batch_size: int) -> InnerState:
    """Fresh TTT-Linear state (`f(x) = x W1 + b1`) for `batch_size` lanes.

    Args:
        W1, b1: per head, `[H, d, d]`, `[H, 1, d]`; see `mlp_state`.
        batch_size: number of lanes, at least 1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, naming each tensor.
    """
    if W1.ndim != 3:
        raise ValueError(f"W1 has shape {list(W1.shape)}, expected [H, d, d]")
    H, d, _ = W1.shape
    parameters = {"W1": W1, "b1": b1}
    _check_shapes(parameters, {"W1": [H, d, d], "b1": [H, 1, d]})
    return _fresh_state(parameters, batch_size)
