"""What a TTT layer's inner loop was given in one call, and what it left: for those who look on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_dist.config import TTTConfig
from ttt_dist.ops import InnerState, token_losses, weight_names


@dataclass(frozen=True)
class Reading:
    """One call of a TTT layer; all tensors are plain and of this rank's own heads.

    Attributes:
        q, k, v, out: `[B, H, L, d]`, as the scan takes and gives them.
        eta: `[B, H, L]`.
        norm_weight, norm_bias: `[H, d]`.
        before, after: the state that the tokens were read from, and what they made of it.
        initial: W0, the *parameters*: `(W1, b1, …)`, `[B, H, …]` views in the state's dtype.
    """

    config: TTTConfig
    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    before: InnerState
    after: InnerState
    initial: tuple[Tensor, ...]
    out: Tensor

    def learned(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """What the inner loop makes of the frames that count.

        Args:
            read: bool `[B, L]`, False for frames at the end of a lane that are no part of it. (A
                model reads them too; they would be in the step of a last mini-batch.)

        Returns:
            Inner losses `[3, B, H, L]` at W0, before and after each token's step (`token_losses`),
            and `‖W_t - W0‖²` and `‖W0‖²` of every lane at its end, over own heads: `[2, B]`.
        """
        losses, weights = token_losses(
            self.k,
            self.v,
            self.eta * read[:, None],
            self.norm_weight,
            self.norm_bias,
            self.before,
            self.initial,
            mini_batch_size=self.config.mini_batch_size,
            inner_eps=self.config.inner_eps,
        )
        changes = [w - w0 for w, w0 in zip(weights, self.initial, strict=True)]
        squares = [torch.stack([*map(_squares, each)]) for each in (changes, self.initial)]
        return losses, torch.stack(squares).sum(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """In the order in which they are computed, with names for a person."""
        names = weight_names(self.after.depth)
        named = {f"state before, {n}": t for n, t in zip(names, self.before.weights, strict=True)}
        named |= {"q": self.q, "k": self.k, "v": self.v, "eta": self.eta}
        named |= {f"state after, {n}": t for n, t in zip(names, self.after.weights, strict=True)}
        return named | {"outputs of the scan": self.out}


def _squares(x: Tensor) -> Tensor:
    """`[B, …]` to `[B]`."""
    return x.square().flatten(1).sum(1)
