"""Moshi's transformer layer with TTT between attention and feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence
from moshi.modules.transformer import StreamingTransformerLayer
from moshi.utils.compile import no_compile
from torch import Tensor, nn

from ttt_dist.config import TTTConfig
from ttt_dist.layer import TTTLayer
from ttt_dist.moshi.attention import AttentionWindow, attend
from ttt_dist.moshi.carry import Carry, LayerCarry, LayerPassage, Passage
from ttt_dist.moshi.frames import AllFrames, FrameSharing
from ttt_dist.moshi.loss import masked_cross_entropy
from ttt_dist.moshi.packed import pack_attention, pack_gating
from ttt_dist.moshi.streaming import (
    SkippedTTTState,
    TTTLayerState,
    check_causal,
    check_one_frame,
    read_frame,
)
from ttt_dist.ops import InnerState

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


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

    def gate(self, x: Tensor, y: Tensor) -> Tensor:
        """`x + tanh(alpha) * y`, all `[B, L, D]`; `y` is what the TTT layer gives for `x`."""
        return x + torch.tanh(self.alpha).to(x.dtype) * y


class HybridStreamingTransformerLayer(ShardableLayout, StreamingTransformerLayer):
    """`StreamingTransformerLayer` with an optional TTT block; parameter names stay Moshi's.

    Without TTT (`ttt` is None) it computes what Moshi's layer computes, and so it serves as the
    layer class of the whole model. `skip_ttt` leaves the block out, for comparisons
    (`build.without_ttt`). A call starts from TTT's learned initial weights, a step of a stream
    (Moshi's streaming API) from where the last one ended; a stream keeps the `skip_ttt` that it
    began with. A call over a piece of recordings (`TTTMoshi.passing`) goes on from the last piece.

    Outside of streams, causal self-attention is computed in time and memory O(T · context)
    (`attention.py`) where `windowed` is true; that is in all layers but those with weights per
    step, as the Depformer's, and with shared keys and values, which stay Moshi's.

    The packed weights of self-attention and gated feed-forward are kept in a shape that tensor
    parallelism can cut (`packed.py`); `splittable` tells whether all of the layer's are. Layers
    with weights per step, as the Depformer's, stay as they are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ttt: TTTBlock | None = None
        self.skip_ttt = False
        # Set by `TTTMoshi.passing` for the time of one forward.
        self.passage: LayerPassage | None = None
        packed_attention = not self.skip_self_attn and pack_attention(self.self_attn)
        packed_gating = pack_gating(self.gating)
        self.windowed = packed_attention and self.self_attn.causal
        self.splittable = packed_attention and packed_gating and self.cross_attention is None

    def add_ttt(self, block: TTTBlock) -> None:
        """Put `block` between attention and feed-forward."""
        if self.ttt is not None:
            raise ValueError("this layer has a TTT block already")
        if self.is_streaming:
            raise RuntimeError("this layer is streaming; add TTT before or after")
        self.ttt = block

    def wrap_parts(self, backbone: Wrapper, ttt: Wrapper) -> None:
        """Put `backbone` around Moshi's computation and `ttt` around the TTT layer's.

        A layer without TTT is one part. One with TTT is three: attention, the TTT layer, gate and
        feed-forward: FSDP2 gathers the TTT layer's weights in hooks that stay outside of all
        wrappers. (Wrapper modules would do as much, and change the parameters' names.)
        """
        if self.ttt is None:
            self._whole = backbone(self._whole)  # type: ignore[method-assign]
            return
        self._attend = backbone(self._attend)  # type: ignore[method-assign]
        self.ttt.layer.forward = ttt(self.ttt.layer.forward)  # type: ignore[method-assign]
        self._gate_and_feed = backbone(self._gate_and_feed)  # type: ignore[method-assign]

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Inside, the parts run without what `wrap_parts` has put around them."""
        found: list[tuple[nn.Module, str]] = [
            (self, name) for name in ("_whole", "_attend", "_gate_and_feed")
        ]
        if self.ttt is not None:
            found.append((self.ttt.layer, "forward"))
        # Wrapped parts are attributes of the instance, in front of the class's methods.
        wrapped = [
            (each, name, each.__dict__.pop(name)) for each, name in found if name in each.__dict__
        ]
        try:
            yield
        finally:
            for each, name, part in wrapped:
                setattr(each, name, part)

    def _init_streaming_state(self, batch_size: int) -> Any:
        state = super()._init_streaming_state(batch_size)
        if self.ttt is None:
            return state
        if self.skip_ttt:
            return SkippedTTTState(batch_size, state.device)
        return TTTLayerState.start(self.ttt.layer, batch_size, state.device)

    def forward(self, x: Tensor, cross_attention_src: Tensor | None = None) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        if self.passage is not None:
            return self._pass_on(x, self.passage)
        state = self._streaming_state
        check_one_frame(state, x.shape[1])
        if self.ttt is None:
            x, _ = self._whole(x, cross_attention_src, None)
        else:
            x, _ = self._attend(x, cross_attention_src, None)
            if state is not None:
                y = read_frame(self.ttt.layer, x, state)
            else:
                y = None if self.skip_ttt else self.ttt.layer(x)[0]
            x = self._gate_and_feed(x, y)
        if state is not None:
            state.offset_cpu += x.shape[1]
        return x

    def _pass_on(self, x: Tensor, passage: LayerPassage) -> Tensor:
        """Read a piece of recordings `[B, L, D]` after what `passage` brings; fill in the rest."""
        inner = passage.before.inner
        if self.ttt is None:
            x, window = self._whole(x, None, passage.window)
        else:
            x, window = self._attend(x, None, passage.window)
            y = None
            if inner is not None and not self.skip_ttt:
                start = InnerState.at_border(inner)
                y, state = self.ttt.layer(x, start, begins=passage.inner_begins)
                inner = state.weights
            x = self._gate_and_feed(x, y)
        assert window is not None  # one was given
        passage.after = LayerCarry(window, inner)
        return x

    def _whole(
        self, x: Tensor, cross_attention_src: Tensor | None, window: AttentionWindow | None
    ) -> tuple[Tensor, AttentionWindow | None]:
        x, window = self._attend(x, cross_attention_src, window)
        return self._gate_and_feed(x, None), window

    def _attend(
        self, x: Tensor, cross_attention_src: Tensor | None, window: AttentionWindow | None
    ) -> tuple[Tensor, AttentionWindow | None]:
        """Self- and cross-attention; with a window also the one after `x` (`attention.attend`)."""
        with _moshis_own_compilation(x):
            if self.windowed and not self.is_streaming:
                update, window = attend(self.self_attn, self.norm1(x), window)
                x = x.to(update) + self.layer_scale_1(update)
            elif window is None:
                x = self._sa_block(x)
            else:
                raise ValueError("this layer can't take an attention window (see `windowed`)")
            if self.cross_attention is None:
                return x, window
            if cross_attention_src is None:
                raise ValueError("this layer has cross-attention; give cross_attention_src")
            return self._cross_attention_block(x, cross_attention_src), window

    def _gate_and_feed(self, x: Tensor, y: Tensor | None) -> Tensor:
        with _moshis_own_compilation(x):
            if self.ttt is not None and y is not None:
                x = self.ttt.gate(x, y)
            return self._ff_block(x)


class TTTMoshi(ShardableLayout, LMModel):
    """Moshi's language model, of hybrid layers; what `build.build_model` returns.

    `frames` says which frames this rank's Depformer computes in training; all, unless
    `parallel/parallelize.py` shares them among tp ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frames: FrameSharing = AllFrames()

    def initial_tokens(self) -> list[int]:
        """Of each row of codes, the token that stands before its first."""
        return self._get_initial_token().flatten().tolist()

    def steps(self, codes: Tensor) -> Tensor:
        """The sequence that the model learns from `codes`: delayed, after its initial tokens.

        Args:
            codes: int `[B, K, T]`, text first; -1 has no target.

        Returns:
            `[B, K, T + 1]`; the model reads its first T steps to predict the last T.
        """
        initial = self._get_initial_token().expand(len(codes), -1, -1)
        return torch.cat([initial, _delay_sequence(self.delays, codes, initial)], dim=2)

    def read_frames(self, steps: Tensor) -> Tensor:
        """Which of the T frames that `steps` `[B, K, T + 1]` feed in are read to predict a code.

        Returns:
            bool `[B, T]`, False where a recording is over, or a lane has none.
        """
        targets = steps[:, :, 1:]
        cards = torch.full((targets.shape[1], 1), self.card, device=steps.device)
        cards[0] = self.text_card
        return ((targets >= 0) & (targets < cards)).any(dim=1)

    def step_losses(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every target in `steps` `[B, K, T + 1]`, or a piece of such a sequence.

        As `loss.token_losses(self(codes), codes)`, but by step, not by frame: the losses of a
        codebook are later by its delay. The Depformer's logits exist for own frames alone.

        Returns:
            text `[B, 1, T]` and audio `[B, dep_q, T]`, 0 where nothing is predicted; float32
            (float64 for float64 models), the same on all ranks that share the sample.
        """
        inputs, targets = steps[:, :, :-1], steps[:, :, 1:]  # [B, K, T]
        transformer_out, text_logits = self.forward_text(inputs)
        text = _step_losses(text_logits, targets[:, :1])

        own_targets = self.frames.own(targets, dim=2)
        own_out = self.frames.own(transformer_out, dim=1)
        logits = self.forward_depformer_training(own_targets, own_out)  # [B, dep_q, own T, card]
        audio = _step_losses(logits, own_targets[:, 1 : 1 + self.dep_q])
        return text, self.frames.all(audio, dim=2, frames=targets.shape[2])

    @contextmanager
    def passing(
        self, carry: Carry, begins: Tensor, inner_begins: Tensor | None = None
    ) -> Iterator[Passage]:
        """Inside, one forward takes a piece of recordings, a lane each, that goes on from `carry`.

        What the piece leaves is the passage's `carry`, in the graph. (No argument of the forward:
        FSDP2 would cast the inner weights to the dtype of computation.)

        Args:
            carry: what the piece before left, of as many lanes.
            begins: bool `[B]`, lanes whose recording begins here, whatever `carry` has for them.
            inner_begins: bool `[B]`, lanes whose TTT layers begin with their learned weights, while
                attention goes on; None: those of `begins`.
        """
        passage = Passage(carry, begins, inner_begins)
        layers = list(self.transformer.layers)
        for layer, part in zip(layers, passage.layers, strict=True):
            layer.passage = part
        try:
            yield passage
        finally:
            for layer in layers:
                layer.passage = None

    def forward_text(self, sequence: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Moshi's, with a check ahead of the first layer's step: `[B, K, S]`, S = 1 in streams."""
        for layer in self.transformer.layers:
            check_one_frame(layer._streaming_state, sequence.shape[2])
        return super().forward_text(sequence, *args, **kwargs)

    def _start_streaming(self, batch_size: int, exit_stack: ExitStack) -> None:
        # Before any module has a streaming state: Moshi would leave those that come first in it.
        for layer in self.transformer.layers:
            if layer.ttt is not None and not layer.skip_ttt:
                check_causal(layer.ttt.layer.config)
        super()._start_streaming(batch_size, exit_stack)


def _moshis_own_compilation(x: Tensor) -> AbstractContextManager[None]:
    """Moshi compiles some functions itself: on GPUs alone, and where nothing else does."""
    if x.device.type == "cuda" and not torch.compiler.is_compiling():
        return nullcontext()
    return no_compile()


def _step_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy `[B, k, T]`, 0 for targets that are no code: initial tokens and -1."""
    is_code = (targets >= 0) & (targets < logits.shape[-1])
    return masked_cross_entropy(logits, is_code, targets)
