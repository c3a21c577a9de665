"""Moshi's transformer layer with TTT between attention and feed-forward."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingTransformerLayer
from moshi.utils.compile import no_compile
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttt_dist.config import TTTConfig
from ttt_dist.layer import TTTLayer
from ttt_dist.moshi.packed import pack_attention, pack_gating

_NO_STREAMING = (
    "streaming inference of layers with TTT is not built yet: Moshi's streaming API would forget "
    "the TTT state between steps"
)


class ShardableLayout:
    """First base of every Moshi class that FSDP2 shards.

    FSDP2 assigns a new `__class__` to the module. Moshi's classes start with `abc.ABC`, whose
    instances have another memory layout than those of FSDP2's class, so Python refuses; with a
    plain class in front the layouts agree.
    """


class TTTBlock(nn.Module):
    """`x + tanh(alpha) * TTT(x)`, the part that a hybrid layer adds to Moshi's.

    Args:
        config: the TTT layer's.
        initial_alpha: initial value of the gate `alpha [D]`; 0 leaves Moshi as it is.
    """

    def __init__(
        self,
        config: TTTConfig,
        initial_alpha: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.initial_alpha = initial_alpha
        self.layer = TTTLayer(config, device=device, dtype=dtype)
        self.alpha = nn.Parameter(
            torch.full((config.model_dim,), initial_alpha, device=device, dtype=dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`; every call starts from the learned initial weights."""
        y, _ = self.layer(x)
        return x + torch.tanh(self.alpha).to(x.dtype) * y


class HybridStreamingTransformerLayer(ShardableLayout, StreamingTransformerLayer):
    """`StreamingTransformerLayer` with an optional TTT block; parameter names stay Moshi's.

    Without TTT (`ttt` is None) it computes what Moshi's layer computes, and so it serves as the
    layer class of the whole model. `checkpoint_activations` recomputes the layer in the backward
    instead of keeping its activations; `parallel/activation.py` sets it. (A wrapper module would
    change the parameters' names.) `skip_ttt` leaves the block out, for comparisons
    (`build.without_ttt`).

    The packed weights of self-attention and gated feed-forward are kept in a shape that tensor
    parallelism can cut (`packed.py`); `splittable` tells whether all of the layer's are. Layers
    with weights per step, as the Depformer's, stay as they are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ttt: TTTBlock | None = None
        self.checkpoint_activations = False
        self.skip_ttt = False
        packed = [not self.skip_self_attn and pack_attention(self.self_attn)]
        packed.append(pack_gating(self.gating))
        self.splittable = all(packed) and self.cross_attention is None

    def add_ttt(self, block: TTTBlock) -> None:
        """Put `block` between attention and feed-forward (before any streaming call)."""
        if self.ttt is not None:
            raise ValueError("this layer has a TTT block already")
        self.ttt = block

    def _init_streaming_state(self, batch_size: int) -> Any:
        if self.ttt is not None:
            raise RuntimeError(_NO_STREAMING)
        return super()._init_streaming_state(batch_size)

    def forward(self, x: Tensor, cross_attention_src: Tensor | None = None) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            # The layer draws no random numbers, so none need to be kept and replayed.
            return checkpoint(
                self._compute,
                x,
                cross_attention_src,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return self._compute(x, cross_attention_src)

    def _compute(self, x: Tensor, cross_attention_src: Tensor | None) -> Tensor:
        # Moshi's own rule: its fused kernels are compiled on GPUs alone.
        with nullcontext() if x.device.type == "cuda" else no_compile():
            x = self._sa_block(x)
            if self.cross_attention is not None:
                if cross_attention_src is None:
                    raise ValueError("this layer has cross-attention; give cross_attention_src")
                x = self._cross_attention_block(x, cross_attention_src)
            if self.ttt is not None and not self.skip_ttt:
                x = self.ttt(x)
            x = self._ff_block(x)
            state = self._streaming_state
            if state is not None:
                state.offset_cpu += x.shape[1]
            return x


class TTTMoshi(ShardableLayout, LMModel):
    """Moshi's language model, of hybrid layers; what `build.build_model` returns."""

    def _start_streaming(self, batch_size: int, exit_stack: ExitStack) -> None:
        # Before any module has a streaming state: Moshi would leave those that come first in it.
        if any(isinstance(module, TTTBlock) for module in self.modules()):
            raise RuntimeError(_NO_STREAMING)
        super()._start_streaming(batch_size, exit_stack)
