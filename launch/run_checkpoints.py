"""A run's checkpoints, as a person names them: by the run's folder, perhaps with a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.config import TrainConfig
from launch.errors import UserError
from launch.run_folder import RunFolder
from launch.run_status import read_status
from parallel.checkpoint import checkpoint_step, list_checkpoints
from parallel.checkpoint_manifest import content_problems, structure_problems
from ttt_dist.data.dataset import PieceDataset
from ttt_dist.data.recordings import RecordingDataset


def choose_checkpoint(run: Path, step: int | None, *, named: str, read: bool = True) -> Path:
    """The checkpoint after `step`, or the newest.

    Args:
        run: the run's folder.
        named: what the command calls it, for messages.
        read: as `undamaged` has it.

    Raises:
        UserError: there is none, or none of this step, or it is damaged.
    """
    folder = RunFolder(run).checkpoints
    found = {checkpoint_step(path): path for path in list_checkpoints(folder)}
    if not found:
        raise UserError(
            f"{named}: {folder} holds no checkpoint (step-NNNNNN); train with do_ckpt=true"
        )
    if step is not None and step not in found:
        raise UserError(
            f"--step: found {step}, allowed: {', '.join(map(str, found))}, which {folder} has; "
            "leave it out for the newest"
        )
    return undamaged(found[max(found) if step is None else step], named=named, read=read)


def undamaged(checkpoint: Path, *, named: str, read: bool = True) -> Path:
    """The checkpoint itself; raises UserError where a file isn't what was saved.

    Args:
        read: all its files are read and hashed; otherwise names and sizes alone tell, and ranks can
            share the rest (`content_problems`).
    """
    problems = content_problems(checkpoint, alone=True) if read else structure_problems(checkpoint)
    if problems:
        raise UserError(
            f"{named}: {checkpoint} is damaged: {'; '.join(problems)}; name another one"
        )
    return checkpoint


def newest_step(run: RunFolder) -> int:
    """Steps done at the newest checkpoint, by its name; 0 where there is none."""
    return max(map(checkpoint_step, list_checkpoints(run.checkpoints)), default=0)


def resume_problems(config: TrainConfig) -> list[str]:
    """Why the run in `config.run_dir` can't be resumed, as far as names and sizes of files tell."""
    folder = RunFolder(Path(config.run_dir)).checkpoints
    checkpoints = list_checkpoints(folder)
    if not checkpoints and list(folder.glob("damaged-*")):
        return [
            f"resume: {folder} holds no checkpoint (step-NNNNNN) but damaged ones; nothing starts "
            "anew over them: restore one, or start a new run in another run_dir"
        ]
    if not checkpoints:  # ended before its first one, for instance by its node
        return []
    damaged = []
    for path in reversed(checkpoints):
        problems = structure_problems(path)
        if not problems:
            return _nothing_left(config, path)
        damaged.append(f"{path.name}: {'; '.join(problems)}")
    return [
        f"resume: none of the checkpoints in {folder} is whole ({' | '.join(damaged)}); nothing "
        "starts anew over them: restore one, or start a new run in another run_dir"
    ]


def order_facts(data: PieceDataset | RecordingDataset) -> list[dict[str, Any]]:
    """What the global order depends on beside the configuration, for `Progress.sources`."""
    pieces = data.source_sizes if isinstance(data, PieceDataset) else data.source_pieces
    each = zip(data.source_paths, pieces, data.weights, data.source_digests, strict=True)
    return [
        {"path": str(path), "pieces": count, "weight": weight, "recordings": digest}
        for path, count, weight, digest in each
    ]


def other_data_problems(saved: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """Why a run can't go on with these sources: its next samples would be others.

    Args:
        saved: `order_facts` of the checkpoint. Paths may change.
        found: those of this start.
    """
    key = "data.train_data"
    if len(saved) != len(found):
        problems = [f"{key}: {len(found)} sources, but the checkpoint was made with {len(saved)}"]
    else:
        problems = [
            f"{key}: {now['path']}: found {now['pieces']} pieces and weight {now['weight']:g}, but "
            f"the checkpoint was made with {then['pieces']} and {then['weight']:g} ({then['path']})"
            for then, now in zip(saved, found, strict=True)
            if (then["pieces"], then["weight"]) != (now["pieces"], now["weight"])
        ] or [
            f"{key}: {now['path']}: its recordings are others than the checkpoint was made with "
            f"({then['path']}), or stand in another order, by file names and pieces of each"
            for then, now in zip(saved, found, strict=True)
            # Checkpoints of earlier versions have none.
            if then.get("recordings", now["recordings"]) != now["recordings"]
        ]
    if not problems:
        return []
    return [
        *problems,
        "resume: goes on in the order that the run began with, so put the data back; to train on "
        "other data with these weights, export them (launch/export.py) and start a new run from "
        "that folder (moshi_paths.hf_repo_id)",
    ]


def _nothing_left(config: TrainConfig, newest: Path) -> list[str]:
    # By its name: what it holds isn't hashed yet, and an older one may be good.
    done = checkpoint_step(newest)
    # After the last step comes an evaluation, which the run may not have lived to see.
    ended = read_status(RunFolder(Path(config.run_dir))).get("state") == "finished"
    if done < config.max_steps or (done == config.max_steps and not ended):
        return []
    return [
        f"resume: {newest} has done {done} steps and max_steps is {config.max_steps}, so "
        "nothing is left to do; raise max_steps to train on"
    ]
