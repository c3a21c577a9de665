"""What goes along from one piece of a recording to the next, in lanes of one recording each.

A layer remembers two things: the last frames' keys and values, as far as its attention window
reaches back, and the weights of its TTT layer's inner networks. The next piece of the same
recording takes them up, so N pieces one after the other give what one piece N times as long gives.
The parameters stay what they are: the learned weights that a recording begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_dist.moshi.attention import AttentionWindow
from ttt_dist.ops import weight_names


@dataclass(frozen=True)
class LayerCarry:
    """What one layer hands on; all tensors have the lanes as their first dim.

    Attributes:
        window: keys and values of the frames that the next ones still see.
        inner: `(W1, b1, …)` after all completed mini-batches, as `ttt_dist.ops.InnerState` has
            them, float32 (float64); None in layers without TTT. Pieces end at the border of a
            mini-batch, so there is nothing else to carry.
    """

    window: AttentionWindow
    inner: tuple[Tensor, ...] | None

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerCarry:
        """`function` applied to every tensor."""
        inner = None if self.inner is None else tuple(function(t) for t in self.inner)
        return LayerCarry(AttentionWindow(*map(function, self.window)), inner)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: `keys`, `values`, `length`, and with TTT `W1`, `b1`, …"""
        named: dict[str, Tensor] = self.window._asdict()
        if self.inner is not None:
            named |= zip(weight_names(len(self.inner) // 2), self.inner, strict=True)
        return named

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LayerCarry:
        """One with these in place of its own, named as in `tensors()`."""
        names = list(self.tensors())
        window = AttentionWindow(*(tensors[name] for name in AttentionWindow._fields))
        rest = tuple(tensors[name] for name in names[len(AttentionWindow._fields) :])
        return LayerCarry(window, None if self.inner is None else rest)


@dataclass(frozen=True)
class Carry:
    """What all layers of the main transformer hand on, first to last."""

    layers: tuple[LayerCarry, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Carry:
        """`function` applied to every tensor."""
        return Carry(tuple(layer.map(function) for layer in self.layers))

    def detach(self) -> Carry:
        """The same values, cut off from the graph that made them (truncated backpropagation)."""
        return self.map(torch.Tensor.detach)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, e.g. `3.W1`: layer 3's."""
        return {
            f"{index}.{name}": value
            for index, layer in enumerate(self.layers)
            for name, value in layer.tensors().items()
        }

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Carry:
        """One with these in place of its own, named as in `tensors()`."""
        layers = []
        for index, layer in enumerate(self.layers):
            own = {name: tensors[f"{index}.{name}"] for name in layer.tensors()}
            layers.append(layer.with_tensors(own))
        return Carry(tuple(layers))


@dataclass
class LayerPassage:
    """One layer's part in the forward of a piece.

    Attributes:
        begins: bool `[B]`, lanes whose recording begins with this piece: what they carry is left.
        inner_begins: bool `[B]`, lanes whose inner weights begin as learned; `begins`, unless an
            evaluation asks what they are worth from piece to piece.
        before: what the piece before left; zeros will do where all lanes begin.
        after: what this piece leaves, once the layer's forward is done.
    """

    begins: Tensor
    inner_begins: Tensor
    before: LayerCarry
    after: LayerCarry | None = None

    @property
    def window(self) -> AttentionWindow:
        """The frames before this piece that attention may see."""
        return self.before.window.reset(self.begins)


class Passage:
    """One piece of every lane on its way through the layers; see `TTTMoshi.passing`."""

    def __init__(self, carry: Carry, begins: Tensor, inner_begins: Tensor | None) -> None:
        inner = begins if inner_begins is None else inner_begins
        self.layers = [LayerPassage(begins, inner, layer) for layer in carry.layers]

    @property
    def carry(self) -> Carry:
        """What the piece leaves for the next one, once the forward is done."""
        after = [layer.after for layer in self.layers if layer.after is not None]
        if len(after) != len(self.layers):
            raise RuntimeError("no forward over this piece has gone through all layers")
        return Carry(tuple(after))
