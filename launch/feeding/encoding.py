"""Encoding audio at the start of a job, by all of its ranks, with a bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from moshi.models.loaders import CheckpointInfo
from tqdm import tqdm

from ttt_dist.data.cache import CodesSpec
from ttt_dist.data.encode import load_codec
from ttt_dist.data.manifest import Recording


@contextmanager
def encoding_over_ranks(
    recordings: Sequence[Recording],
    release: CheckpointInfo,
    spec: CodesSpec,
    device: torch.device,
    max_encode_sec: float,
) -> Iterator[dict[str, Any]]:
    """Arguments of `open_pieces` and `open_recordings`, with which each rank encodes a share.

    Args:
        recordings: of all splits, for the bar.
        max_encode_sec: as they have it.
    """
    with tqdm(
        total=len(recordings), desc="audio to codes", unit="file", disable=dist.get_rank() != 0
    ) as bar:

        def encoded(_: Recording, __: bool) -> None:
            # This rank's, and meanwhile one of each other's; the last shares may be shorter.
            bar.update(min(dist.get_world_size(), len(recordings) - bar.n))

        yield {
            "codec": lambda: load_codec(release, spec, device),
            "rank": dist.get_rank(),
            "world_size": dist.get_world_size(),
            "agree": problems_of_all_ranks,
            "max_encode_sec": max_encode_sec,
            "progress": encoded,
        }


def problems_of_all_ranks(problems: list[str]) -> list[str]:
    """All ranks' problems, one rank after the other; they call it together."""
    gathered = [problems] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
    return [problem for each in gathered for problem in each]
