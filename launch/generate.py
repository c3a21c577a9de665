"""Talk to a trained model: a user's audio in, Moshi's audio and text out.

    python launch/generate.py CHECKPOINT --audio in.wav --out out.wav [--text out.txt]

CHECKPOINT is a run folder of `launch/train.py` (its newest checkpoint, or `--step N`) or one of its
`checkpoints/step-NNNNNN`, saved on any number of ranks. Everything else comes from the run's own
`config.yaml`: release, Mimi and tokenizer, attention windows, TTT. The audio is heard frame by
frame (80 ms), as in a live conversation, so memory doesn't depend on its length.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts this file's folder first on the path; the packages stand one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from moshi.models.lm import LMGen
from moshi.models.loaders import CheckpointInfo
from tqdm import tqdm

from launch.config import TrainConfig, load_config
from launch.errors import UserError, exit_with
from launch.generate_audio import MoshiAudio, MoshiText, UserAudio
from launch.run_folder import RunFolder
from launch.setup import attention_windows, lay_out_model, model_dtypes, ttt_placement
from launch.unbuilt import refuse_unbuilt
from parallel.checkpoint import CheckpointError, list_checkpoints, load_weights
from parallel.device import device_type, local_device
from ttt_dist.data.audio import SAMPLE_RATE
from ttt_dist.data.cache import CodesSpec
from ttt_dist.data.encode import Codec, load_codec
from ttt_dist.data.interleave import FRAME_RATE
from ttt_dist.data.manifest import DataError
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import lm_settings, transformer_layers
from ttt_dist.moshi.context import (
    check_attention_contexts,
    describe_attention_contexts,
    read_attention_contexts,
)
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.lm_config import lm_config_problems
from ttt_dist.moshi.release import open_release


@dataclass(frozen=True)
class Speed:
    """How long a conversation took: seconds of audio, seconds of work, and of each frame's work."""

    audio_sec: float
    work_sec: float
    frame_sec: Sequence[float]

    def __str__(self) -> str:
        frames = np.array(self.frame_sec) * 1000
        return (
            f"{self.audio_sec:.1f} s of audio in {self.work_sec:.1f} s: real-time factor "
            f"{self.work_sec / self.audio_sec:.2f} (live needs less than 1); a frame takes "
            f"{np.median(frames):.1f} ms (99% of them at most {np.percentile(frames, 99):.1f} ms)"
        )


def find_checkpoint(folder: Path, step: int | None) -> tuple[Path, Path]:
    """The run folder and the checkpoint that a person names.

    Raises:
        UserError: `folder` is neither a run nor one of its checkpoints, or has no such step.
    """
    if not folder.is_dir():
        raise UserError(f"CHECKPOINT: {folder} is no folder; allowed: a run folder of train.py")
    run, chosen = folder, None
    if not (run / "config.yaml").is_file() and folder in list_checkpoints(folder.parent):
        run, chosen = folder.parents[1], folder
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"CHECKPOINT: {run} holds no config.yaml; allowed: a run folder of train.py, or its "
            "checkpoints/step-NNNNNN"
        )
    if chosen is not None:
        if step is not None:
            raise UserError(f"--step: found {step}, but CHECKPOINT names {chosen.name} already")
        return run, chosen
    checkpoints = list_checkpoints(RunFolder(run).checkpoints)
    if not checkpoints:
        raise UserError(f"CHECKPOINT: {RunFolder(run).checkpoints} holds no step-NNNNNN")
    if step is None:
        return run, checkpoints[-1]
    named = {int(path.name.removeprefix("step-")): path for path in checkpoints}
    if step not in named:
        raise UserError(f"--step: found {step}, allowed: {', '.join(map(str, sorted(named)))}")
    return run, named[step]


def load_model(
    config: TrainConfig, release: CheckpointInfo, checkpoint: Path, device: torch.device
) -> TTTMoshi:
    """The run's model in eval mode, whole on `device`, in the dtypes that training computes in.

    Raises:
        CheckpointError: the checkpoint is damaged or isn't this model's.
    """
    _, compute = model_dtypes(config, device)
    model = lay_out_model(config, release.lm_config, None, compute)
    for name, parameter in model.named_parameters():
        # As FSDP2 gathers them: TTT layers in their master dtype, all else for computing.
        if ".ttt.layer." not in name:
            parameter.data = parameter.data.to(compute)
    model.to_empty(device=device)
    load_weights(checkpoint, model)
    return model.eval().requires_grad_(False)


def describe_model(config: TrainConfig, release: CheckpointInfo, model: TTTMoshi) -> list[str]:
    """Windows and TTT settings as the modules have them, in training's words, a line each.

    Raises:
        RuntimeError: they aren't those of the configuration.
    """
    contexts = read_attention_contexts(model)
    placement = ttt_placement(config, release.lm_config)
    layers = () if placement is None else placement.layers
    check_attention_contexts(contexts, ttt_layers=layers, **attention_windows(config))
    lines = [f"attention context: {describe_attention_contexts(contexts)}"]
    for index, layer in enumerate(transformer_layers(model)):
        if layer.ttt is None:
            continue
        inner = layer.ttt.layer
        found = inner.config
        if placement is None or found != placement.layer:
            raise RuntimeError(f"layer {index}: TTT is {found}, configured {placement}")
        shapes = ", ".join(
            f"{name} {list(value.shape)}"
            for name, value in inner.named_parameters()
            if name[0] in "Wb" and name[1:].isdigit()
        )
        gate = layer.ttt.alpha.float().tanh().abs().mean().item()
        lines.append(
            f"layer {index}: TTT-{found.inner_model}, {shapes}; mini-batches of "
            f"{found.mini_batch_size}, base_lr {found.base_lr:g}, inner_eps {found.inner_eps:g}; "
            f"mean gate {gate:.4f}"
        )
    return lines


@torch.no_grad()
def converse(
    model: TTTMoshi, codec: Codec, audio: UserAudio, sampling: dict[str, Any]
) -> Iterator[tuple[int, np.ndarray]]:
    """Moshi's text token and audio `[FRAME_SAMPLES]` for each frame of the user's, as they come."""
    mimi = codec.mimi
    device = next(model.parameters()).device
    generator = LMGen(model, **sampling)
    with mimi.streaming(1), generator.streaming(1):
        first = True
        for samples in audio.read_frames():
            heard = mimi.encode(torch.from_numpy(samples).to(device)[None, None])  # [1, K, 1]
            if first:
                # LMGen's first step reads initial tokens whatever it is given: as in training, the
                # first frame is read in the second.
                generator.step(heard)
                first = False
            tokens = generator.step(heard)  # [1, 1 + dep_q, 1]
            if tokens is None:  # delayed codebooks of Moshi's first frame are still to come
                continue
            said = mimi.decode(tokens[:, 1:])
            yield int(tokens[0, 0, 0]), said[0, 0].float().cpu().numpy()


def talk(
    model: TTTMoshi,
    codec: Codec,
    audio: UserAudio,
    sampling: dict[str, Any],
    *,
    out: Path,
    text: Path | None,
) -> Speed:
    """Stream `audio` through the model, writing what Moshi says as it comes."""
    silent = frozenset({model.text_padding_token_id, model.end_of_text_padding_id})
    words = MoshiText(codec.tokenizer, silent)
    times = array("d")
    with ExitStack() as stack:
        wav = stack.enter_context(MoshiAudio(out))
        transcript = None
        if text is not None:
            transcript = stack.enter_context(text.open("w", encoding="utf-8"))
        bar = stack.enter_context(
            tqdm(total=audio.frames, desc="talking", unit="frame", mininterval=1.0)
        )
        begin = last = time.perf_counter()
        for token, samples in converse(model, codec, audio, sampling):
            wav.write(samples)
            if transcript is not None:
                transcript.write(words.text_of(token))
            now = time.perf_counter()
            times.append(now - last)
            last = now
            factor = (now - begin) * FRAME_RATE / len(times)
            bar.set_postfix_str(f"real-time factor {factor:.2f}", refresh=False)
            bar.update()
        if transcript is not None:
            transcript.write("\n")
    return Speed(len(times) / FRAME_RATE, last - begin, times)


def generate(arguments: argparse.Namespace) -> None:
    """The whole command, once its arguments are read."""
    problems = []
    for option, path in (("--out", arguments.out), ("--text", arguments.text)):
        if path is not None and not path.absolute().parent.is_dir():
            problems.append(f"{option}: {path.absolute().parent} is no folder; create it first")
        elif path is not None and path.is_dir():
            problems.append(f"{option}: {path} is a folder; name a file")
    paths = [p.absolute() for p in (arguments.audio, arguments.out, arguments.text) if p]
    if len(set(paths)) < len(paths):
        problems.append("--audio, --out and --text: name different files")
    audio = None
    try:
        run, checkpoint = find_checkpoint(arguments.checkpoint.absolute(), arguments.step)
    except UserError as error:
        problems += error.problems
    try:
        audio = UserAudio(arguments.audio)
    except UserError as error:
        problems += error.problems
    if problems or audio is None:
        raise UserError(problems, title=TITLE)

    config = load_config(run / "config.yaml")
    release = open_release(**config.moshi_paths.model_dump())
    problems = refuse_unbuilt(config) + lm_config_problems(lm_settings(release.lm_config))
    if problems:
        raise UserError(problems, title=TITLE)
    device = torch.device("cpu") if arguments.device == "cpu" else local_device()
    codec = load_codec(release, CodesSpec.from_release(release, duration_sec=1.0), device)
    model = load_model(config, release, checkpoint, device)
    compute = str(model_dtypes(config, device)[1]).removeprefix("torch.")
    print(f"checkpoint: {checkpoint}\nrelease: {release.moshi_weights.parent}")
    for line in describe_model(config, release, model):
        print(line)
    print(f"compute in {compute} on {device}\n{audio.describe()}", flush=True)
    sampling = {**release.lm_gen_config}
    for name in ("temp", "temp_text"):
        if (value := getattr(arguments, name)) is not None:
            sampling[name] = value
    torch.manual_seed(arguments.seed)  # here, so that it doesn't matter what loading has drawn
    speed = talk(model, codec, audio, sampling, out=arguments.out, text=arguments.text)
    print(f"{speed}\nMoshi's audio: {arguments.out} ({SAMPLE_RATE} Hz, mono)")
    if arguments.text is not None:
        print(f"Moshi's text: {arguments.text}")


TITLE = "Can't generate"


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, allowed: 0 (the likeliest token) or more")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/generate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--audio", type=Path, required=True, help="the user: mono, or stereo right")
    parser.add_argument("--out", type=Path, required=True, help="Moshi's audio, a wav file")
    parser.add_argument("--text", type=Path, help="Moshi's text")
    parser.add_argument("--step", type=int, help="the checkpoint after this step, not the newest")
    parser.add_argument("--temp", type=_temperature, help="of audio tokens; 0: the likeliest")
    parser.add_argument("--temp-text", type=_temperature, help="of text tokens; 0: the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="default: a GPU")
    return parser


def main(command_line: Sequence[str]) -> None:
    """Run the command; a person's mistake ends it with exit code 2 and one message."""
    arguments = _parser().parse_args(command_line)
    if arguments.device == "cpu" and device_type() != "cpu":
        # Libraries choose their device when they are imported, so start over without GPUs.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.execv(sys.executable, [sys.executable, *sys.argv])
    try:
        generate(arguments)
    except UserError as error:
        exit_with(error)
    except DataError as error:
        exit_with(UserError(error.problems, title=TITLE))
    except (ReleaseError, CheckpointError) as error:
        exit_with(UserError(str(error), title=TITLE))


if __name__ == "__main__":
    main(sys.argv[1:])
