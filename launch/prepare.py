"""Encode a configuration's recordings ahead of training.

    python launch/prepare.py [CONFIG] [key.path=value ...]
    torchrun --nproc_per_node=8 launch/prepare.py [CONFIG] [key.path=value ...]

Takes the same file and overrides as `launch/train.py` and fills the cache that it reads. Under
torchrun each process encodes its share, on the GPU of its local rank where there is one. That may
take hours: each finishes its share whatever another meets, then all problems are told at once, and
a job that was ended goes on where it stopped.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first on the path; the packages stand one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from moshi.models.loaders import CheckpointInfo
from tqdm import tqdm

from launch.config import TrainConfig, load_config, parse_command_line
from launch.errors import UserError, exit_with
from launch.feeding.batch_plan import carries_states, length_stages
from launch.feeding.encoding import problems_of_all_ranks
from parallel.mesh import close_process_group, init_process_group, leave_job
from ttt_dist.data.cache import CodesCache, CodesSpec
from ttt_dist.data.dataset import default_cache_folder
from ttt_dist.data.encode import EncodeReport, encode_missing, load_codec, share_of
from ttt_dist.data.manifest import DataError, Recording, Source, all_recordings, read_sources
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.release import open_release

# The first rank that is done waits for the last one.
ENCODING_TIMEOUT = timedelta(days=14)
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n}/{total} s [{elapsed}<{remaining}]"


def read_splits(config: TrainConfig, *, check_files: bool) -> dict[str, tuple[Source, ...]]:
    """Sources of `data.train_data` and, with `do_eval`, `data.eval_data`; all problems at once."""
    splits: dict[str, tuple[Source, ...]] = {}
    problems: list[str] = []
    specs = {"train": config.data.train_data, "eval": config.data.eval_data}
    for name, spec in specs.items():
        if name == "eval" and not (config.do_eval and spec):
            continue
        try:
            splits[name] = read_sources(spec, field=f"data.{name}_data", check_files=check_files)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return splits


def codes_specs(config: TrainConfig, release: CheckpointInfo) -> dict[int, CodesSpec]:
    """What a configuration's codes are, by the step (from 0) that first takes them: pieces of each
    length, or whole recordings where states are carried."""
    lengths: dict[int, float | None] = {**length_stages(config)}
    if carries_states(config):
        lengths = dict.fromkeys(lengths)
    made = {sec: CodesSpec.from_release(release, duration_sec=sec) for sec in {*lengths.values()}}
    return {step: made[seconds] for step, seconds in lengths.items()}


def open_cache(
    config: TrainConfig, splits: dict[str, tuple[Source, ...]], spec: CodesSpec
) -> CodesCache:
    """The cache of a configuration: `data.cache_dir`, or the default place for its train data."""
    folder = config.data.cache_dir
    return CodesCache(Path(folder) if folder else default_cache_folder(splits["train"]), spec)


def prepare(
    config: TrainConfig,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    agree: Callable[[list[str]], list[str]] = list,
) -> str:
    """Encode this rank's share; returns what was done, a line for each length of pieces.

    Args:
        agree: returns, once every rank has called it, the problems of all of them.

    Raises:
        DataError: mistakes in the data or the base checkpoint, of any rank; on all alike.
    """
    problems: list[str] = []
    with _collect(problems):
        # Every rank looks at its own files anyway; one is enough for the check of all of them.
        splits = read_splits(config, check_files=rank == 0)
        info = open_release(**config.moshi_paths.model_dump())
        specs = tuple(dict.fromkeys(codes_specs(config, info).values()))
    _raise_any(agree(problems))
    recordings = [recording for sources in splits.values() for recording in all_recordings(sources)]
    share = share_of(recordings, rank, world_size)
    lines = []
    for spec in specs:
        cache = open_cache(config, splits, spec)
        with (
            _collect(problems),
            tqdm(
                total=sum(round(recording.duration) for recording in share),
                desc="encoding audio",
                bar_format=_BAR,
                disable=os.environ.get("LOCAL_RANK", "0") != "0",
            ) as bar,
        ):

            def advance(recording: Recording, _encoded: bool, bar: tqdm = bar) -> None:
                bar.update(round(recording.duration))

            report = encode_missing(
                recordings,
                cache,
                partial(load_codec, info, spec, device),
                rank=rank,
                world_size=world_size,
                progress=advance,
            )
            lines.append(_summary(report, cache, rank, world_size))
    _raise_any(agree(problems))
    return "\n".join(lines)


@contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        problems += error.problems
    except ReleaseError as error:
        problems.append(str(error))


def _raise_any(problems: list[str]) -> None:
    if problems:
        raise DataError(problems)


def _summary(report: EncodeReport, cache: CodesCache, rank: int, world_size: int) -> str:
    who = f"rank {rank} of {world_size}: " if world_size > 1 else ""
    cut = "whole" if cache.spec.frames is None else f"{report.pieces} pieces"
    return (
        f"{who}{report.recordings} recordings, {cut}, {report.audio_sec:.0f} s of "
        f"audio; encoded now: {report.encoded} ({report.encoded_sec:.0f} s), already cached: "
        f"{report.cached}; {report.work_sec:.1f} s of work; cache: {cache.folder}"
    )


def main(arguments: Sequence[str]) -> None:
    """Run the command; a person's mistake ends it with exit code 2 and one message."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config = load_config(*parse_command_line(arguments))
    except UserError as error:
        exit_with(error)
    use_gpu = torch.cuda.is_available() and config.device != "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    over_ranks = world_size > 1
    if over_ranks:
        init_process_group(ENCODING_TIMEOUT, on_cpu=True)
    told: UserError | None = None
    try:
        line = prepare(
            config,
            rank=rank,
            world_size=world_size,
            device=device,
            agree=problems_of_all_ranks if over_ranks else list,
        )
        print(line, flush=True)
    except DataError as error:
        told = UserError(error.problems, title="Can't prepare the data")
    if over_ranks:
        close_process_group()
    if told is not None:
        exit_with(told)


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_job(0)
