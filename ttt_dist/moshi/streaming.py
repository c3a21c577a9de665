"""The TTT state of a hybrid layer in Moshi's streaming API.

A stream's inner networks are a Moshi `State`, so that `streaming`, `reset_streaming`,
`set_exec_mask` and `get`/`set_streaming_state` reach them as they reach Moshi's own caches. A step
writes into the same tensors, takes the same operators whatever their values and asks the device for
none of them: what `LMGen` needs to record it as a CUDA graph and to replay it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from moshi.modules.streaming import State
from moshi.modules.transformer import _LayerState
from torch import Tensor

from ttt_dist.config import TTTConfig
from ttt_dist.layer import TTTLayer
from ttt_dist.ops import InnerState


@dataclass(kw_only=True)
class TTTLayerState(_LayerState):
    """State of `batch_size` streams in one hybrid layer.

    `InnerState.tensors()` of `inner` is all that the layer remembers of its streams beyond the
    attention window.

    Attributes:
        inner: weights, pending updates and offsets, a lane for each stream, float32 (float64 in
            float64 models). Never a *fresh* one: a replayed step cannot choose another path for the
            first frame, so even a stream's start has its offset and its pending update of zero.
        initial: what a reset puts back, the learned initial weights at the stream's start.
    """

    inner: InnerState
    initial: InnerState

    @classmethod
    def start(cls, layer: TTTLayer, batch_size: int, device: torch.device) -> TTTLayerState:
        """Streams at their first frame.

        Raises:
            RuntimeError: the layer looks ahead (`causal=False`).
        """
        check_causal(layer.config)
        initial = layer.initial_state(batch_size).detach()
        # `initial` is one lane, seen `batch_size` times; each stream needs weights of its own.
        inner = initial.map(lambda t: t.clone(memory_format=torch.contiguous_format))
        inner = replace(inner, mini_batch_size=layer.config.mini_batch_size)
        return cls(batch_size=batch_size, device=device, inner=inner, initial=initial)

    def reset(self, reset_mask: Tensor) -> None:
        """Begin anew in the lanes of `reset_mask` (bool `[B]`)."""
        super().reset(reset_mask)
        self._write(reset_mask, self.initial)

    def read(self, layer: TTTLayer, x: Tensor) -> Tensor:
        """What the TTT layer gives for the next frame `x [B, 1, D]`, read into the state.

        Lanes that `exec_mask` leaves out stay as they are, whatever stands in their frame.
        """
        y, after = layer(x, self.inner)
        self._write(self.exec_mask, after)
        return y

    def _write(self, lanes: Tensor, new: InnerState) -> None:
        with torch.no_grad():
            values = new.tensors()
            for name, old in self.inner.tensors().items():
                mask = lanes.view(-1, *(1,) * (old.ndim - 1))
                torch.where(mask, values[name], old, out=old)


@dataclass
class SkippedTTTState(_LayerState):
    """State of streams that began inside `build.without_ttt`: their TTT block stays left out."""


def check_causal(config: TTTConfig) -> None:
    """Raise RuntimeError for a TTT layer whose frames need later ones."""
    if not config.causal:
        raise RuntimeError(
            "this model's TTT layers look ahead within a mini-batch (causal=False), so they can't "
            "stream frame by frame; train with causal=True"
        )


def check_one_frame(state: State | None, frames: int) -> None:
    """Raise ValueError where a hybrid layer's streams are given several frames at once.

    TTT could take them, but Moshi's attention would be wrong: its ring cache holds as many frames
    as the window, and the last of a chunk overwrite what the first should still see.
    """
    if isinstance(state, TTTLayerState) and frames != 1:
        raise ValueError(
            f"found {frames} frames in one streaming step, allowed is 1: Moshi's attention cache "
            "is right one frame at a time only; give the frames one after the other"
        )


def read_frame(layer: TTTLayer, x: Tensor, state: State) -> Tensor | None:
    """The TTT layer's output for a streaming step `x [B, 1, D]`; None where it is left out.

    Raises:
        RuntimeError: `state` is that of a layer without TTT.
    """
    if isinstance(state, SkippedTTTState):
        return None
    if not isinstance(state, TTTLayerState):
        raise RuntimeError(
            f"a layer with TTT was given a streaming state without ({type(state).__name__}): it "
            "comes from another model, or TTT was added after the stream had begun"
        )
    return state.read(layer, x)
