"""The data of a run from its first step to its last: one feed for each length of pieces."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from itertools import islice, pairwise
from typing import Any

import torch
from moshi.models.loaders import CheckpointInfo
from torch import Tensor

from launch.config import TrainConfig
from launch.feeding.batch_plan import LanePlan, length_stages
from launch.feeding.encoding import encoding_over_ranks
from launch.feeding.feed import Feed, PieceFeed, RecordingFeed
from launch.prepare import codes_specs, open_cache, read_splits
from launch.run_checkpoints import order_facts
from launch.setup import say
from parallel.mesh import Mesh
from ttt_dist.data.batches import SampledStep
from ttt_dist.data.cache import CodesSpec
from ttt_dist.data.check import too_few_pieces, too_few_recordings
from ttt_dist.data.dataset import PieceDataset, open_pieces
from ttt_dist.data.manifest import DataError, Source, all_recordings
from ttt_dist.data.recordings import RecordingDataset, open_recordings
from ttt_dist.moshi.block import TTTMoshi


class StagedFeed:
    """Feeds one after another; each begins an order of its own, and lanes begin anew with it.

    Args:
        feeds: by the step, counted from 0, that each begins with; in order, the first with 0.
    """

    def __init__(self, feeds: dict[int, Feed[Any]]) -> None:
        self._feeds = feeds

    @property
    def last(self) -> Feed[Any]:
        """The one that evaluations read from, so that their losses can be compared."""
        return next(reversed(self._feeds.values()))

    @property
    def facts(self) -> list[dict[str, Any]]:
        """`order_facts` of all training data."""
        return [fact for feed in self._feeds.values() for fact in order_facts(feed.sets["train"])]

    @property
    def lengths(self) -> list[int]:
        """Frames of a piece, of every feed."""
        return [feed.sets["train"].frames for feed in self._feeds.values()]

    def at(self, step: int) -> Feed[Any]:
        """The feed of a step, counted from 0."""
        return self._feeds[max(first for first in self._feeds if first <= step)]

    def start(self, model: TTTMoshi) -> None:
        """Get ready to feed this model."""
        for feed in self._feeds.values():
            feed.start(model)

    def carried(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of any step's feed, to be loaded into."""
        return self.at(0).carried()

    def restore(self, step: int, carried: Mapping[str, Tensor]) -> None:
        """Go on with this step from values that were loaded into what `carried` gave."""
        self.at(0).finish()
        self.at(step).restore(carried)

    def batches(
        self, first_step: int
    ) -> AbstractContextManager[Iterator[tuple[Feed[Any], SampledStep]]]:
        """This rank's share of step `first_step` (from 0) and of every next one, and its feed."""
        return closing(self._batches(first_step))

    def _batches(self, first_step: int) -> Generator[tuple[Feed[Any], SampledStep], None, None]:
        for first, end in pairwise([*self._feeds, None]):
            assert first is not None
            if end is not None and end <= first_step:
                continue
            start = max(first_step, first)
            with self._feeds[first].batches(start - first) as batches:
                for batch in islice(batches, None if end is None else end - start):
                    yield self._feeds[first], batch
            self._feeds[first].finish()


def open_feeds(
    config: TrainConfig,
    plan: LanePlan | None,
    release: CheckpointInfo,
    mesh: Mesh,
    device: torch.device,
) -> StagedFeed:
    """The data of a run, encoded where the cache lacks it; along recordings where there is a plan.

    All ranks call it together and encode a share each.

    Raises:
        DataError: it can't be encoded, or is too little for so many ranks.
    """
    splits = read_splits(config, check_files=False)  # preflight has looked at the files
    specs, stages = codes_specs(config, release), length_stages(config)
    feeds: dict[int, Feed[Any]] = {}
    for step, seconds in stages.items():
        wanted = {"train": splits["train"]}
        if config.do_eval and step == max(stages):
            wanted["eval"] = splits["eval"]
        feeds[step] = _open_feed(
            config, plan, wanted, specs[step], seconds, release, mesh, device, step
        )
    return StagedFeed(feeds)


def _open_feed(
    config: TrainConfig,
    plan: LanePlan | None,
    splits: dict[str, tuple[Source, ...]],
    spec: CodesSpec,
    duration_sec: float,
    release: CheckpointInfo,
    mesh: Mesh,
    device: torch.device,
    first_step: int,
) -> Feed[Any]:
    cache = open_cache(config, splits, spec)
    recordings = [r for sources in splits.values() for r in all_recordings(sources)]
    longest = config.data.max_inline_encode_sec
    feed: Feed[Any]
    with encoding_over_ranks(recordings, release, spec, device, longest) as encoding:
        if plan is None:
            pieces = open_pieces(splits, cache, **encoding)
            count = len(pieces["train"])
            # With one piece for two ranks a step would hold it twice.
            few = too_few_pieces(count, mesh.dp_size, duration_sec, "data.train_data")
            feed = PieceFeed(config, pieces, mesh, device, first_step)
        else:
            frames = plan.piece_frames(duration_sec)
            whole = open_recordings(splits, cache, piece_frames=frames, **encoding)
            count = whole["train"].num_recordings
            few = too_few_recordings(count, plan.num_lanes, "data.train_data")
            feed = RecordingFeed(config, plan, whole, mesh, device, first_step)
    if few:
        raise DataError(few)
    for name, dataset in feed.sets.items():
        say(f"{name} data: {_describe(dataset)}, codes: {cache.folder}")
    return feed


def _describe(dataset: PieceDataset | RecordingDataset) -> str:
    pieces = f"{len(dataset)} pieces of {dataset.frames} frames"
    if isinstance(dataset, RecordingDataset):
        return f"{dataset.num_recordings} recordings, {pieces}"
    return pieces
