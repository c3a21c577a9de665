"""A conversation of one user with Moshi, frame by frame, and all that it consists of.

It goes as moshi's own inference does (`moshi.run_inference`): Mimi hears a frame, LMGen steps, Mimi
speaks. What belongs to a conversation between two frames: the streaming states of Mimi
(encoder and decoder), of LMGen (tokens that are delayed) and of the language model (attention
caches, TTT's inner networks with their pending updates), the random numbers, and the start of a
character that isn't complete. `launch/talking/conversation_file.py` saves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from moshi.models.lm import LMGen
from torch import Tensor

from launch.talking.audio import MoshiText
from ttt_dist.data.encode import Codec
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.stream_state import load_stream_tensors, stream_tensors

_MAX_PENDING = 3  # bytes of a UTF-8 character that lacks its last


class Conversation:
    """One stream of a model in eval mode; a context manager, within which frames are heard.

    Args:
        sampling: LMGen's arguments; the random numbers are torch's own, of the model's device.
    """

    def __init__(self, model: TTTMoshi, codec: Codec, sampling: Mapping[str, Any]) -> None:
        self._mimi = codec.mimi
        self._generator = LMGen(model, **sampling)
        self._device = model.device
        silent = frozenset({model.text_padding_token_id, model.end_of_text_padding_id})
        self._words = MoshiText(codec.tokenizer, silent)
        self._first = True
        self._stack = ExitStack()

    def __enter__(self) -> Conversation:
        self._stack.enter_context(self._mimi.streaming(1))
        self._stack.enter_context(self._generator.streaming(1))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @torch.no_grad()
    def hear(self, samples: np.ndarray) -> tuple[str, np.ndarray] | None:
        """The user's next frame, float32 `[FRAME_SAMPLES]` at 24 kHz.

        Returns:
            Moshi's text and audio `[FRAME_SAMPLES]` for a frame; None while delayed codebooks of
            its first are still to come.
        """
        audio = torch.from_numpy(samples).to(self._device)[None, None]
        heard = self._mimi.encode(audio)  # [1, K, 1]
        if self._first:
            # LMGen's first step reads initial tokens whatever it is given: as in training, the
            # first frame is read in the second.
            self._generator.step(heard)
            self._first = False
        tokens = self._generator.step(heard)  # [1, 1 + dep_q, 1]
        if tokens is None:
            return None
        said = self._mimi.decode(tokens[:, 1:])
        text = self._words.text_of(int(tokens[0, 0, 0]))
        return text, said[0, 0].float().cpu().numpy()

    def state(self) -> dict[str, Tensor]:
        """The conversation as it stands, by name; some are the live tensors, which change."""
        found = {f"mimi.{name}": value for name, value in stream_tensors(self._mimi).items()}
        for name, value in stream_tensors(self._generator).items():
            found[f"generator.{name}"] = value
        for name, value in stream_tensors(self._generator.lm_model).items():
            found[f"model.{name}"] = value
        pending = self._words.pending
        padded = pending.ljust(_MAX_PENDING, b"\0")
        found["text"] = torch.tensor([len(pending), *padded], dtype=torch.uint8)
        found["random"] = self._random_state()
        return found

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where another conversation of the same model stood.

        Args:
            state: names, shapes and dtypes of `self.state()`, after at least one frame.
        """
        for prefix, module in (
            ("mimi.", self._mimi),
            ("generator.", self._generator),
            ("model.", self._generator.lm_model),
        ):
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            load_stream_tensors(module, own)
        count, *pending = state["text"].tolist()
        self._words.pending = bytes(pending[:count])
        self._set_random_state(state["random"])
        self._first = False

    def _random_state(self) -> Tensor:
        """Of the device's generator, which is what sampling draws from; uint8 on the CPU."""
        if self._device.type == "cuda":
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()

    def _set_random_state(self, state: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)
