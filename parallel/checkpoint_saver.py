"""Saving while training goes on: copied at once, written and hashed by a thread, committed by a
rename.

A folder `step-NNNNNN` is complete: every rank has written and hashed its files in a folder of
another name, and rank 0 has written the manifest of all and seen all of them, before it renames
that folder. Nothing that exists is written to again; a save that fails is tried once more, in a new
folder.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer

from parallel.checkpoint import (
    PROGRESS_FILE,
    Progress,
    checkpoint_step,
    list_checkpoints,
    run_tensors,
)
from parallel.checkpoint_manifest import (
    FileRecord,
    hash_file,
    structure_problems,
    write_manifest,
)
from parallel.checkpoint_metadata import CheckpointError
from parallel.device import device_type, local_device
from parallel.mesh import from_first_rank

_PATIENCE_SEC = 60.0  # for a save under way when the run fails: its other ranks may be gone
_SECOND_TRY_AFTER_SEC = 10.0
_SEEN_WITHIN_SEC = 90.0  # NFS may believe for 60 s that another node's new file isn't there


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `newest` (None: all), and those after each `every`-th step."""

    newest: int | None = None
    every: int | None = None


class SaveError(CheckpointError):
    """A checkpoint could not be saved; those before it are as they were."""


class CheckpointSaver:
    """Saves one checkpoint after another, one at a time.

    All ranks call each method together. Use it as a context manager: leaving it waits for the save
    under way.

    Args:
        folder: the run's `checkpoints`, on a file system that all ranks see.
        keep: older checkpoints beyond these are removed once a new one is committed.
        announce: told, on rank 0 and from its thread, of each new checkpoint, of a save that is
            tried again, and of folders that could not be removed.
        timeout: how long ranks that have written their part wait for the slowest; never less than
            torch's 30 minutes, since training goes on meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        keep: Keep,
        announce: Callable[[str], None] | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        self._folder, self._keep, self._announce = folder, keep, announce
        # Of its own: its collectives run beside those of training.
        self._group = dist.new_group(backend="gloo", timeout=max(timeout, default_pg_timeout))
        self._saving: Future[Path] | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._saving is not None:
            # The run fails already; what can still be saved is.
            wait([self._saving], timeout=_PATIENCE_SEC)

    def save(
        self,
        model: nn.Module,
        optimizers: OptimizersContainer,
        schedulers: LRSchedulersContainer,
        progress: Progress,
        carried: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy all that a run needs to go on, and begin to write it; see `finish`.

        Args:
            carried: as `parallel.checkpoint.load_checkpoint` has it.

        Raises:
            SaveError: the save before this one failed, or this step's folder exists.
        """
        self.finish()
        target = self._folder / f"step-{progress.step:06d}"
        if target.exists():
            raise SaveError(f"{target} exists; a checkpoint is never written over")
        partial = self._folder / from_first_rank(f".saving-{target.name}-{uuid.uuid4().hex[:8]}")
        every = run_tensors(model, optimizers, carried or {})
        tensors = {name: _copied(value) for name, value in every.items()}
        self._saving = _in_background(
            lambda: self._save_or_again(tensors, progress, partial, target)
        )

    def has_failed(self) -> bool:
        """Whether the last save has ended without a checkpoint; never waits."""
        saving = self._saving
        return saving is not None and saving.done() and saving.exception() is not None

    def finish(self) -> Path | None:
        """Wait for the save under way; the newest checkpoint committed here.

        Raises:
            SaveError: on all ranks, where any rank could not write its part, twice in a row.
        """
        return None if self._saving is None else self._saving.result()

    def _save_or_again(
        self, tensors: dict[str, Tensor], progress: Progress, partial: Path, target: Path
    ) -> Path:
        """Every rank's thread: one try, and a second one; or fail, on all ranks alike."""
        failure = self._try(tensors, progress, partial, target)
        if failure is not None:
            # All ranks have it, so all try again. A file system may be well a moment later.
            self._say(f"warning: {failure}; trying once more in {_SECOND_TRY_AFTER_SEC:g} s")
            time.sleep(_SECOND_TRY_AFTER_SEC)
            again = partial.with_name(f"{partial.name}-again")
            failure = self._try(tensors, progress, again, target)
        if failure is not None:
            raise failure
        if dist.get_rank() == 0:
            self._after_commit(target)
        return target

    def _try(
        self, tensors: dict[str, Tensor], progress: Progress, partial: Path, target: Path
    ) -> SaveError | None:
        """What went wrong, if so; what was written is removed then, since it would fill the disk.

        Not raised: a second try's own errors would have it as their context.
        """
        try:
            self._write(tensors, progress, partial, target)
        except SaveError as error:  # on all ranks: none writes there any more
            failure = error
        else:
            return None
        if dist.get_rank() == 0:
            try:
                if partial.exists():
                    shutil.rmtree(partial)
            except OSError as error:
                self._say(f"warning: {partial} isn't used, and could not be removed: {error}")
        return failure

    def _write(
        self, tensors: dict[str, Tensor], progress: Progress, partial: Path, target: Path
    ) -> None:
        try:
            dcp.save(tensors, storage_writer=_Writer(partial), process_group=self._group)
        except dcp.CheckpointException as error:
            # DCP has told all ranks of it.
            causes = (f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
            raise SaveError(f"{target} could not be saved: {'; '.join(causes)}") from error
        rank, world_size = dist.get_rank(), dist.get_world_size()
        files: dict[str, FileRecord] = {}
        failure = ""
        try:
            if rank == 0:
                (partial / PROGRESS_FILE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
            # By each rank those that it wrote: other nodes may not see them yet.
            files = {path.name: hash_file(path) for path in partial.iterdir() if _is_of(path, rank)}
        except OSError as error:
            failure = f"rank {rank}: {error}"
        gathered: list[tuple[dict[str, FileRecord], str]] = [({}, "")] * world_size
        dist.all_gather_object(gathered, (files, failure), group=self._group)
        failures = [failure for _, failure in gathered if failure]
        if rank == 0 and not failures:
            every_file = {name: record for part, _ in gathered for name, record in part.items()}
            try:
                _commit(partial, target, every_file)
            except OSError as error:
                failures = [f"rank 0: {error}"]
        dist.broadcast_object_list(told := [failures], src=0, group=self._group)
        if told[0]:
            raise SaveError(f"{target} could not be saved: {'; '.join(told[0])}")

    def _after_commit(self, target: Path) -> None:
        """What may fail without the new checkpoint being any worse, or the run ending for it."""
        lines = [f"checkpoint: {target}"]
        try:
            _sync(self._folder)
            lines += _prune(self._folder, self._keep)
        except OSError as error:
            lines.append(f"warning: {self._folder}: {error}; older checkpoints stay for now")
        self._say("\n".join(lines))

    def _say(self, lines: str) -> None:
        if self._announce is not None:
            with suppress(OSError):  # a terminal that is gone
                self._announce(lines)


def _commit(partial: Path, target: Path, files: Mapping[str, FileRecord]) -> None:
    """Rank 0's part: the manifest, and the checkpoint's own name; raises OSError."""
    write_manifest(partial, files)
    deadline = time.monotonic() + _SEEN_WITHIN_SEC
    while problems := structure_problems(partial):
        if time.monotonic() > deadline:
            told = "; ".join(problems)
            raise OSError(f"{told}; is {partial.parent} on a file system that all nodes share?")
        time.sleep(0.5)
    _sync(*partial.iterdir(), partial)
    os.rename(partial, target)


def _copied(value: Tensor) -> Tensor:
    """A copy on the CPU, of this rank's part of a DTensor; it says what part that is."""
    # Not by DCP's stager, which copies meshes, too, and on torch 2.11 fails the second time.
    if not isinstance(value, DTensor):
        return value.detach().to("cpu", copy=True)
    local = value.to_local().detach().to("cpu", copy=True)
    # `from_local` would move it back to the mesh's device.
    return DTensor(local, value._spec, requires_grad=False)


class _Writer(dcp.FileSystemWriter):
    """DCP's, but it tells what failed first: torch's zip writer hides a full disk behind its own
    complaint ("unexpected pos 704 vs 598")."""

    def __init__(self, folder: Path) -> None:
        # Tensors are copied to the CPU already: DCP's stream of a GPU would wait for nothing.
        super().__init__(folder, per_thread_copy_ahead=0)

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:
            first: BaseException = error
            while (earlier := first.__cause__ or first.__context__) is not None:
                first = earlier
            raise OSError(f"{type(first).__name__}: {first}") from error


def _is_of(path: Path, rank: int) -> bool:
    """Whether `rank` wrote this file; DCP names files of tensors `__RANK_NUMBER.distcp`."""
    if path.suffix != ".distcp":
        return rank == 0
    return path.name.startswith(f"__{rank}_")


def _in_background(work: Callable[[], Path]) -> Future[Path]:
    """Run `work` in a thread that doesn't hold up the end of a process that fails."""
    future: Future[Path] = Future()

    def run() -> None:
        try:
            if device_type() == "cuda":
                # A new thread's is GPU 0, where each rank that used it would open a context.
                torch.cuda.set_device(local_device())
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _sync(*paths: Path) -> None:
    """Have files, or a folder's names, on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path, keep: Keep) -> list[str]:
    """Remove checkpoints that need not stay; the newest, just written and hashed, always does.

    Returns:
        A warning for each that could not be removed.
    """
    if keep.newest is None:
        return []
    warnings = []
    for path in list_checkpoints(folder)[: -keep.newest]:
        if keep.every is not None and checkpoint_step(path) % keep.every == 0:
            continue
        # Renamed first, so that no half-deleted folder ever has a checkpoint's name.
        doomed = path.with_name(f".removing-{path.name}")
        try:
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.append(f"warning: {path} could not be removed: {error}")
    return warnings
