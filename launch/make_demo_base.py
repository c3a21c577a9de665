"""Write the demo's base checkpoint: `python -m launch.make_demo_base [OUT]`.

A folder in the layout of Kyutai's releases, small enough for a CPU, that moshi's own loaders read
as they read `kyutai/moshiko-pytorch-bf16`:

    config.json               Moshi 7B's keys with smaller numbers, and the other files' names
    model.safetensors         Moshi, float32, initialised as moshi does (untrained), fixed seed
    mimi.safetensors          Mimi with codebooks fitted to the demo speech (`demo_codec.py`)
    mimi_config.json          its configuration
    tokenizer.model           sentencepiece, trained on the demo transcripts

Only the training part of the demo (`configs/demo/train.jsonl`) is looked at; the held-out file is
not. Two runs on one machine give the same bytes. A complete folder is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from moshi.models.loaders import _lm_kwargs, get_moshi_lm
from safetensors.torch import save_file

from launch.demo_codec import BINS, fit_mimi, mimi_config
from launch.errors import EXIT_USER_ERROR
from ttt_dist.data.audio import StereoFile
from ttt_dist.data.manifest import DataError, Recording, all_recordings, read_sources

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUT = ROOT / ".cache" / "demo-base"
DEMO_DATA = ROOT / "configs" / "demo"
SEED = 0
RECIPE = 1  # raise it when the same speech should give other files
TEXT_CARD = 224
_WAIT_SEC = 300  # many times what making it takes, on a busy node
WAIT_SECONDS = 300.0
_REQUIRED_CHARS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()"  # any English text
)
FILES = {
    "moshi_name": "model.safetensors",
    "mimi_name": "mimi.safetensors",
    "mimi_config_name": "mimi_config.json",
    "tokenizer_name": "tokenizer.model",
}


class DemoBaseError(ValueError):
    """The folder cannot be written; the message says why and what to do."""


def lm_config() -> dict[str, Any]:
    """Moshi 7B's keyword arguments with smaller widths, depths and vocabularies.

    Streams, delays, norm, gating, RoPE and a Depformer with weights per step are the 7B's.
    """
    return {
        **_lm_kwargs,
        "dim": 128,
        "num_heads": 8,
        "num_layers": 4,
        "text_card": TEXT_CARD,
        "card": BINS,
        "depformer_dim": 64,
        "depformer_dim_feedforward": int(4.125 * 64),
        "depformer_num_heads": 4,
        "depformer_num_layers": 2,
    }


def read_train(data: Path) -> list[Recording]:
    """The recordings of `data`/train.jsonl, headers checked; raises DemoBaseError."""
    manifest = data / "train.jsonl"
    try:
        return all_recordings(read_sources(str(manifest), field="demo speech"))
    except DataError as error:
        raise DemoBaseError(
            f"{error}\nThe demo's base is fitted to the demo speech, which comes with the "
            "repository (`git checkout -- configs/demo` brings it back)."
        ) from error


def train_tokenizer(recordings: Sequence[Recording]) -> bytes:
    """A sentencepiece model of TEXT_CARD pieces from what both speakers say in the recordings.

    Ids as in Kyutai's tokenizers: 0 unknown (Moshi's end of padding), 1 and 2 sentence start and
    end, 3 padding.
    """
    lines = []
    for recording in recordings:
        alignments = json.loads(recording.alignments_path.read_text())["alignments"]
        for speaker in ("SPEAKER_MAIN", "SPEAKER_OTHER"):
            lines.append(" ".join(word for word, _, who in alignments if who == speaker))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=TEXT_CARD,
        required_chars=_REQUIRED_CHARS,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def signature(recordings: Sequence[Recording]) -> str:
    """SHA-256 of what the base is made from: RECIPE, SEED, both configurations, the demo files."""
    recipe = json.dumps([RECIPE, SEED, lm_config(), mimi_config()])
    digest = hashlib.sha256(recipe.encode())
    for recording in recordings:
        for path in (recording.path, recording.alignments_path):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def is_made(out: Path, sig: str) -> bool:
    """Whether `out` is this very base, complete; False when there is nothing at `out`.

    Raises:
        DemoBaseError: something else is there; nothing is ever overwritten.
    """
    if not out.exists():
        return False
    config_path = out / "config.json"
    advice = f"Delete it (`rm -r {out}`) or name another folder."
    try:
        config = json.loads(config_path.read_text())
        found = config["model_id"]["sig"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoBaseError(
            f"{out} exists and is not a demo base: {config_path} cannot be used "
            f"({type(error).__name__}: {error}). {advice}"
        ) from error
    missing = [name for name in FILES.values() if not (out / name).is_file()]
    if missing:
        raise DemoBaseError(f"{out} is incomplete, it lacks {', '.join(missing)}. {advice}")
    if found != sig:
        raise DemoBaseError(
            f"{out} was made by another version of this code or from other demo speech. {advice}"
        )
    return True


def make_demo_base(out: Path = DEFAULT_OUT, data: Path = DEMO_DATA) -> bool:
    """Write the base checkpoint to `out`; False when it was there already.

    The folder appears complete or not at all (written beside `out`, then renamed).

    Raises:
        DemoBaseError: the demo speech cannot be used, `out` is something else or not writable.
    """
    recordings = read_train(data)
    sig = signature(recordings)
    if is_made(out, sig):
        return False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            _write(folder, recordings, sig)
            folder.rename(out)
    except OSError as error:
        if is_made(out, sig):  # another process was faster
            return False
        raise DemoBaseError(f"{out} cannot be written: {error}") from error
    return True


def _write(folder: Path, recordings: Sequence[Recording], sig: str) -> None:
    lm = lm_config()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small shapes: more threads only wait for each other
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            moshi = get_moshi_lm(None, lm, dtype=torch.float32)
        files = [StereoFile(recording.path) for recording in recordings]
        audio = [torch.from_numpy(file.read(0.0, file.duration)) for file in files]
        mimi = fit_mimi(audio, SEED)
    finally:
        torch.set_num_threads(threads)
    save_file(moshi.state_dict(), folder / FILES["moshi_name"])
    save_file(mimi.state_dict(), folder / FILES["mimi_name"])
    (folder / FILES["mimi_config_name"]).write_text(json.dumps(mimi_config(), indent=2) + "\n")
    (folder / FILES["tokenizer_name"]).write_bytes(train_tokenizer(recordings))
    trace = {"sig": sig, "epoch": 0}  # moshi passes over `model_id`; `is_made` compares it
    config = {**lm, **FILES, "model_type": "moshi", "model_id": trace}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def ensure_demo_base(hf_repo_id: str | None, *, local_rank: int) -> None:
    """Make the default base where a run names it and it isn't there yet; else do nothing.

    For every rank to call before anything reads the base: the first rank of a node makes it, the
    node's others wait for the finished folder.

    Args:
        hf_repo_id: the run's `moshi_paths.hf_repo_id`.
        local_rank: this process's number on its node.

    Raises:
        DemoBaseError: the base cannot be made, or did not appear in time.
    """
    if hf_repo_id is None or Path(hf_repo_id) != DEFAULT_OUT:
        return
    if local_rank == 0:
        _make_and_tell(DEFAULT_OUT, tell_when_there=False)
        return
    sig = signature(read_train(DEMO_DATA))
    deadline = time.monotonic() + _WAIT_SEC
    while not is_made(DEFAULT_OUT, sig):
        if time.monotonic() > deadline:
            raise DemoBaseError(
                f"{DEFAULT_OUT} did not appear within {_WAIT_SEC} s; "
                "make it first: `python -m launch.make_demo_base`"
            )
        time.sleep(0.2)


def _make_and_tell(out: Path, *, tell_when_there: bool) -> None:
    started = time.monotonic()
    if make_demo_base(out):
        print(f"demo base checkpoint: {out} (made in {time.monotonic() - started:.0f} s)")
    elif tell_when_there:
        print(f"demo base checkpoint: {out} (already there)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the demo's tiny base checkpoint.")
    parser.add_argument("out", type=Path, nargs="?", default=DEFAULT_OUT, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        _make_and_tell(options.out, tell_when_there=True)
    except DemoBaseError as error:
        print(f"make_demo_base: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
