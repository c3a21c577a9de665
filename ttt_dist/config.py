"""The TTT layer's hyperparameters, checked where they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ttt_dist.ops import MLP_LAYERS


@dataclass(frozen=True)
class TTTConfig:
    """One TTT layer.

    Args:
        model_dim: `D`, width of the residual stream.
        num_heads: `H`; each head owns an inner network over `d = D / H` features.
        inner_model: "mlp" (TTT-MLP) or "linear" (TTT-Linear).
        mini_batch_size: `C`, frames whose inner gradients are taken at the same weights.
        base_lr: inner learning rate before the gate and the division by `d * C`.
        expansion: hidden size of the inner MLP in multiples of `d`; TTT-Linear has none.
        mlp_layers: linear maps of the inner MLP, 2 to 5, tanh-GELU between them; TTT-Linear has
            one, whatever this says. Two run on the fast path, see `ttt_dist.ops.ttt_mlp`.
        causal: frame i sees only frames j <= i. False reproduces TTT-Video, which looks ahead
            within a mini-batch.
        inner_eps: eps of the inner LayerNorm (TTT.md: 1e-6; TTT-Video has 1e-8).
        checkpoint_group_size: mini-batches that the scan's backward computes again together; None
            takes about the square root of their number, 0 all of them.
        rope_base: base period of the rotary embedding inside a mini-batch.

    Raises:
        ValueError: every field that is out of range, in one message.
    """

    model_dim: int
    num_heads: int
    inner_model: Literal["mlp", "linear"] = "mlp"
    mini_batch_size: int = 16
    base_lr: float = 1.0
    expansion: int = 4
    mlp_layers: int = 2
    causal: bool = True
    inner_eps: float = 1e-6
    checkpoint_group_size: int | None = None
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        problems = []
        for name in ("model_dim", "num_heads", "mini_batch_size", "expansion"):
            if getattr(self, name) < 1:
                problems.append(f"{name}: found {getattr(self, name)}, allowed are integers >= 1")
        if not problems and self.model_dim % self.num_heads:
            problems.append(
                f"num_heads: found {self.num_heads}, allowed are divisors of "
                f"model_dim={self.model_dim}"
            )
        elif not problems and self.head_dim % 2:
            problems.append(
                f"num_heads: gives head_dim {self.head_dim}, allowed is an even one (rotary pairs)"
            )
        if self.inner_model not in ("mlp", "linear"):
            problems.append(f"inner_model: found {self.inner_model!r}, allowed are 'mlp', 'linear'")
        if self.mlp_layers not in MLP_LAYERS:
            problems.append(
                f"mlp_layers: found {self.mlp_layers}, allowed are {MLP_LAYERS[0]} to "
                f"{MLP_LAYERS[-1]}"
            )
        if self.base_lr < 0:
            problems.append(f"base_lr: found {self.base_lr}, allowed are numbers >= 0")
        if self.inner_eps <= 0 or self.rope_base <= 0:
            problems.append("inner_eps and rope_base: allowed are numbers > 0")
        if self.checkpoint_group_size is not None and self.checkpoint_group_size < 0:
            problems.append(
                f"checkpoint_group_size: found {self.checkpoint_group_size}, allowed are None, 0 "
                "(a single group) or more"
            )
        if problems:
            raise ValueError("TTTConfig: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        """`d`, features of one head."""
        return self.model_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """`h`, hidden size of the inner MLP."""
        return self.expansion * self.head_dim

    @property
    def inner_widths(self) -> tuple[int, ...]:
        """Features before, between and after the inner network's linear maps: `d, h, …, h, d`."""
        hidden = self.mlp_layers - 1 if self.inner_model == "mlp" else 0
        return (self.head_dim, *[self.hidden_dim] * hidden, self.head_dim)

    @property
    def scan_is_operator(self) -> bool:
        """Whether the scan is one operator with a backward of its own, as inner models of one or
        two linear maps have it. Deeper ones run by autograd, mini-batch by mini-batch."""
        return self.inner_model == "linear" or self.mlp_layers == 2
