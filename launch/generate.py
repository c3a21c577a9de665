"""Talk to a trained model: a user's audio in, Moshi's audio and text out.

    python launch/generate.py CHECKPOINT --audio in.wav --out out.wav [--text out.txt]
                              [--save-state FILE] [--load-state FILE]

CHECKPOINT is a run folder of `launch/train.py` (its newest checkpoint, or `--step N`), one of its
`checkpoints/step-NNNNNN`, saved on any number of ranks, or a release folder: whatever
`launch/export.py` writes (adapters are merged when they are loaded), or a release without TTT,
which talks as stock Moshi does. Everything else comes from the folder's own configuration: release,
Mimi and tokenizer, attention windows, TTT.
The audio is heard frame by frame (80 ms), as in a live conversation, so memory doesn't depend on
its length.

--save-state keeps the conversation in a new file at its end; --load-state goes on from such a file.
What is then said is what one uninterrupted conversation would have said, sampling included, given
the same options and a first part of whole frames: a part of a frame at the end of --audio is filled
up with silence, which the conversation has then heard. The file is refused for other weights,
settings, device or dtype.
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first on the path; the packages stand one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from launch.commands import chosen_device, telling_mistakes
from launch.errors import UserError
from launch.model_source import find_checkpoint, open_source
from launch.talking.audio import MoshiAudio, UserAudio
from launch.talking.conversation import Conversation
from launch.talking.conversation_file import (
    Identity,
    SavedConversation,
    check_new,
    save_conversation,
)
from launch.talking.talker import (
    TITLE,
    add_model_arguments,
    load_talker,
    sampling_of,
)
from ttt_dist.data.audio import FRAME_SAMPLES, SAMPLE_RATE
from ttt_dist.data.interleave import FRAME_RATE


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


def talk(conversation: Conversation, audio: UserAudio, *, out: Path, text: Path | None) -> Speed:
    """Stream `audio` through the conversation, writing what Moshi says as it comes."""
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
        for frame in audio.read_frames():
            answer = conversation.hear(frame)
            if answer is None:
                continue
            words, samples = answer
            wav.write(samples)
            if transcript is not None:
                transcript.write(words)
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
    device = chosen_device(arguments.device)  # may start this process over
    problems = _path_problems(arguments)
    audio = saved = None
    try:
        folder, checkpoint = find_checkpoint(arguments.checkpoint.absolute(), arguments.step)
    except UserError as error:
        problems += error.problems
    try:
        audio = UserAudio(arguments.audio)
    except UserError as error:
        problems += error.problems
    try:
        saved = SavedConversation(arguments.load_state) if arguments.load_state else None
    except UserError as error:
        problems += error.problems
    if problems or audio is None:
        raise UserError(problems)

    source = open_source(folder, checkpoint, device)
    talker = load_talker(source)
    for line in talker.lines:
        print(line)
    print(audio.describe(), flush=True)
    # Here, so that it doesn't matter what loading has drawn.
    torch.manual_seed(0 if arguments.seed is None else arguments.seed)
    identity, heard = None, 0
    if arguments.load_state is not None or arguments.save_state is not None:
        identity = Identity(talker.weights_fingerprint(), talker.settings)
    conversation = Conversation(talker.model, talker.codec, sampling_of(arguments, talker.release))
    with conversation:
        if saved is not None and identity is not None:
            conversation.take_up(saved.read(identity, conversation.state()))
            heard = saved.frames
            if arguments.seed is not None:
                torch.manual_seed(arguments.seed)
            print(f"goes on: {arguments.load_state}, after {_length(heard)}", flush=True)
        speed = talk(conversation, audio, out=arguments.out, text=arguments.text)
        heard += audio.frames
        if arguments.save_state is not None and identity is not None:
            save_conversation(arguments.save_state, conversation.state(), identity, heard)
    print(f"{speed}\nMoshi's audio: {arguments.out} ({SAMPLE_RATE} Hz, mono)")
    if arguments.text is not None:
        print(f"Moshi's text: {arguments.text}")
    if arguments.save_state is not None:
        rest = -audio.samples % FRAME_SAMPLES
        silence = f", the last {1000 * rest / SAMPLE_RATE:.0f} ms silence" if rest else ""
        print(f"conversation: {arguments.save_state}, {_length(heard)} heard{silence}")


def _path_problems(arguments: argparse.Namespace) -> list[str]:
    problems = []
    for option, path in (("--out", arguments.out), ("--text", arguments.text)):
        if path is not None and not path.absolute().parent.is_dir():
            problems.append(f"{option}: {path.absolute().parent} is no folder; create it first")
        elif path is not None and path.is_dir():
            problems.append(f"{option}: {path} is a folder; name a file")
    if arguments.save_state is not None:
        problems += check_new(arguments.save_state)
    options = ("--audio", "--out", "--text", "--save-state", "--load-state")
    given = [getattr(arguments, name[2:].replace("-", "_")) for name in options]
    paths = [path.absolute() for path in given if path is not None]
    if len(set(paths)) < len(paths):
        problems.append(f"{', '.join(options)}: name different files")
    return problems


def _length(frames: int) -> str:
    return f"{frames} frames ({frames / FRAME_RATE:.1f} s)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/generate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("--audio", type=Path, required=True, help="the user: mono, or stereo right")
    parser.add_argument("--out", type=Path, required=True, help="Moshi's audio, a wav file")
    parser.add_argument("--text", type=Path, help="Moshi's text")
    parser.add_argument("--save-state", type=Path, metavar="FILE", help="a new file")
    parser.add_argument("--load-state", type=Path, metavar="FILE", help="what --save-state wrote")
    parser.add_argument(
        "--seed", type=int, help="of sampling (default 0, or the saved conversation's own numbers)"
    )
    return parser


def main(command_line: Sequence[str]) -> None:
    """Run the command; a person's mistake ends it with exit code 2 and one message."""
    arguments = _parser().parse_args(command_line)
    with telling_mistakes(TITLE):
        generate(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
