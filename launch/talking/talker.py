"""A trained model that can talk, and the options of the commands that let it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moshi.models.loaders import CheckpointInfo

from launch.model_source import CHECKPOINT_HELP, ModelSource, describe_model, load_model
from ttt_dist.data.cache import CodesSpec
from ttt_dist.data.encode import Codec, load_codec
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import lm_settings, transformer_layers
from ttt_dist.moshi.context import read_attention_contexts
from ttt_dist.moshi.fingerprint import fingerprint
from ttt_dist.moshi.lm_config import NOT_BUILT

TITLE = "Can't talk"


@dataclass(frozen=True)
class Talker:
    """A model that can talk, in eval mode on its device.

    Attributes:
        settings: all that decides what it says, but its weights and sampling, as text by key.
        lines: what a person is told of it.
    """

    model: TTTMoshi
    codec: Codec
    release: CheckpointInfo
    settings: Mapping[str, str]
    lines: Sequence[str]

    def weights_fingerprint(self) -> str:
        """`fingerprint` of the language model as it is in memory: one pass over its tensors."""
        return fingerprint(self.model.state_dict())


def load_talker(source: ModelSource) -> Talker:
    """The model with its ears and voice, and what it is, read back from its modules.

    Raises:
        CheckpointError, ReleaseError, DataError: files are damaged or don't fit each other.
        RuntimeError: the modules aren't what the configuration says.
    """
    spec = CodesSpec.from_release(source.release, duration_sec=1.0)
    codec = load_codec(source.release, spec, source.device)
    model = load_model(source)
    compute = str(source.compute).removeprefix("torch.")
    settings = _read_settings(source, model)
    settings |= {
        "Mimi": spec.mimi,
        "tokenizer": spec.tokenizer,
        "dtype": compute,
        "device": source.device.type,
    }
    lines = [
        f"release: {source.release.moshi_weights.parent}",
        *describe_model(source, model),
        f"compute in {compute} on {source.device}",
    ]
    if source.checkpoint is not None:
        lines.insert(0, f"checkpoint: {source.checkpoint}")
    if source.merged is not None:
        lines.insert(1, f"adapters: {source.merged.path}, merged")
    return Talker(model, codec, source.release, settings, lines)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT and the options that every command for talking has."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=CHECKPOINT_HELP)
    parser.add_argument("--step", type=int, help="a run's checkpoint after this step, not its last")
    parser.add_argument("--temp", type=_temperature, help="of audio tokens; 0: the likeliest")
    parser.add_argument("--temp-text", type=_temperature, help="of text tokens; 0: the likeliest")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="default: a GPU")


def sampling_of(arguments: argparse.Namespace, release: CheckpointInfo) -> dict[str, Any]:
    """LMGen's arguments: the release's own, with the temperatures that a person gave."""
    given = {"temp": arguments.temp, "temp_text": arguments.temp_text}
    return {**release.lm_gen_config, **{k: v for k, v in given.items() if v is not None}}


def _read_settings(source: ModelSource, model: TTTMoshi) -> dict[str, str]:
    """Settings of Moshi as configured, windows and TTT as the modules have them, key to text."""
    settings = lm_settings(source.release.lm_config)
    found = {f"config.json {k}": str(v) for k, v in settings.items() if k not in NOT_BUILT}
    for index, (_, context) in enumerate(read_attention_contexts(model)):
        found[f"layer {index} attention context"] = str(context)
    for index, layer in enumerate(transformer_layers(model)):
        if layer.ttt is not None:
            config = asdict(layer.ttt.layer.config)
            del config["checkpoint_group_size"]  # of the backward pass
            found |= {f"layer {index} TTT {key}": str(value) for key, value in config.items()}
    return found


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, allowed: 0 (the likeliest token) or more")
    return value
