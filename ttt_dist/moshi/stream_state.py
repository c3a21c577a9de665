"""All that streaming modules keep of a conversation, as named tensors; and putting it back.

Moshi hands out its states as live objects (`get_streaming_state`), with recorded CUDA graphs and
open contexts between the tensors: within a process they can take turns, into a file they can't go.
Here each class of `State` is taken apart by name. Putting back copies values into the tensors that
are there, so that graphs recorded on them stay right. The Depformer has no part in it: its stream
begins and ends within a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from moshi.models.compression import _MimiState
from moshi.models.lm import _LMGenState
from moshi.modules.conv import _StreamingConv1dState, _StreamingConvTr1dState
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import _LayerState, _MHAState, _TransformerState
from torch import Tensor

from ttt_dist.moshi.streaming import SkippedTTTState, TTTLayerState


@dataclass(frozen=True)
class StateParts:
    """What the fields of a class of `State` are, beside those of `State` itself.

    Attributes:
        tensors: belong to the conversation.
        counters: belong to it too, kept as Python's integers.
        inner: hold tensors of their own (`_tensors`).
        own: are made anew with every stream of the same model: recorded graphs, initial values.
    """

    tensors: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


_CONDITIONS = ("condition_sum", "condition_cross", "cfg_is_masked_until")
STATE_PARTS: Mapping[type[State], StateParts] = {
    State: StateParts(),
    _TransformerState: StateParts(tensors=("offsets",)),
    _LayerState: StateParts(counters=("offset_cpu",)),
    SkippedTTTState: StateParts(counters=("offset_cpu",)),
    TTTLayerState: StateParts(counters=("offset_cpu",), inner=("inner",), own=("initial",)),
    # k_cross and v_cross are those of cross-attention, which this project refuses to build.
    _MHAState: StateParts(
        tensors=("offset",),
        counters=("offset_cpu",),
        inner=("kv_cache",),
        own=("k_cross", "v_cross"),
    ),
    _StreamingConv1dState: StateParts(tensors=("previous", "first")),
    _StreamingConvTr1dState: StateParts(tensors=("partial",)),
    _MimiState: StateParts(
        own=("graphed_tr_enc", "graphed_tr_dec", "graphed_encoder", "graphed_decoder")
    ),
    _LMGenState: StateParts(
        tensors=("cache", "offsets"),
        counters=("offset_cpu",),
        own=(
            *("initial", "graphed_main", "graphed_depth", "exit_stack", *_CONDITIONS),
            *("reset_callback", "set_exec_mask_callback"),
        ),
    ),
}


def stream_tensors(module: StreamingModule) -> dict[str, Tensor]:
    """The state of all of a streaming module's parts, by `part.field`.

    Returns:
        The live tensors themselves, and counters as int64 `[]` on the CPU: copy what has to last
        beyond the next step. Modules that stream by themselves (`set_streaming_detached`) are left
        out, as by `get_streaming_state`.

    Raises:
        RuntimeError: the module isn't streaming, or has a state of a class unknown here.
    """
    found: dict[str, Tensor] = {}
    for name, state in _states(module).items():
        prefix = f"{name}." if name else ""
        found |= {prefix + field: value for field, value in _tensors(state).items()}
        for counter in _parts(state).counters:
            found[prefix + counter] = torch.tensor(getattr(state, counter), dtype=torch.int64)
    return found


def load_stream_tensors(module: StreamingModule, tensors: Mapping[str, Tensor]) -> None:
    """Give a streaming module the state that `tensors` holds, in place.

    Args:
        tensors: under the names and in the shapes and dtypes of `stream_tensors(module)`, on any
            device; others are not looked at.

    Raises:
        KeyError: a name is missing.
        RuntimeError: as `stream_tensors`; or a tensor is of another shape.
    """
    for name, state in _states(module).items():
        prefix = f"{name}." if name else ""
        for field, value in _tensors(state).items():
            value.copy_(tensors[prefix + field])
        for counter in _parts(state).counters:
            setattr(state, counter, int(tensors[prefix + counter]))


def _states(module: StreamingModule) -> dict[str, State]:
    if not module.is_streaming:
        raise RuntimeError(f"{type(module).__name__} isn't streaming, so it has no state")
    return module.get_streaming_state()


def _parts(state: State) -> StateParts:
    # Of this very class: a subclass may hold more.
    if type(state) not in STATE_PARTS:
        raise RuntimeError(f"{type(state).__name__}: a streaming state of an unknown kind")
    return STATE_PARTS[type(state)]


def _tensors(state: State) -> dict[str, Tensor]:
    """By field, as they are now: some of moshi's states take new tensors in a step."""
    found = {"exec_mask": state.exec_mask}
    found |= {field: getattr(state, field) for field in _parts(state).tensors}
    if isinstance(state, TTTLayerState):
        found |= {f"inner.{name}": value for name, value in state.inner.tensors().items()}
    if isinstance(state, _MHAState) and state.kv_cache is not None:
        found["kv_cache.cache"] = state.kv_cache.cache
        found["kv_cache.end_offset"] = state.kv_cache.end_offset
    return found
