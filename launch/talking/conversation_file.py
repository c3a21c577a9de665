"""A conversation in a file: safetensors, with what it takes to refuse it for another model.

The header says of which weights (`fingerprint`) and settings (attention windows, TTT, device,
dtype, Mimi, tokenizer) the conversation is, how many frames it has heard, and the fingerprint of
its own tensors, which tells damage. Nothing of it is ever run: it is no pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from launch.errors import UserError
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.fingerprint import fingerprint
from ttt_dist.moshi.tensor_files import check_tensor_files

FORMAT = "ttt-dist conversation"
VERSION = "1"
_KEYS = ("format", "version", "weights", "settings", "frames", "state")
_TOLD = 5  # differences that a message lists
_NO = "nothing"


@dataclass(frozen=True)
class Identity:
    """Of which model a conversation is.

    Attributes:
        weights: `fingerprint` of the language model's.
        settings: everything else that decides what it says, but sampling: key to text.
    """

    weights: str
    settings: Mapping[str, str]


def save_conversation(
    path: Path, state: Mapping[str, Tensor], identity: Identity, frames: int
) -> None:
    """Write the file `path` by another name and a rename.

    Raises:
        UserError: the disk refuses.
    """
    # Copies: some tensors are views of one storage, which safetensors refuses to write.
    tensors = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "weights": identity.weights,
        "settings": json.dumps(dict(identity.settings)),
        "frames": str(frames),
        "state": fingerprint(tensors),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--save-state: {path} can't be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


class SavedConversation:
    """A file that `save_conversation` has written; its tensors are read once all else fits.

    Attributes:
        frames: that the user has been heard for.

    Raises:
        UserError: there is no such file, or it is something else, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise UserError(f"--load-state: {path} is no file; allowed: what --save-state wrote")
        try:
            check_tensor_files(path)
        except ReleaseError as error:
            raise UserError(f"--load-state: {error}") from error
        with safe_open(path, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise self._problem("is no saved conversation; allowed: what --save-state wrote")
        if metadata.get("version") != VERSION:
            raise self._problem(
                f"is of version {metadata.get('version')!r:.20}, allowed: {VERSION!r}; begin anew, "
                "or go on with the release of this project that saved it"
            )
        missing = [key for key in _KEYS if key not in metadata]
        if missing or not metadata["frames"].isdecimal():
            raise self._problem(f"is damaged: its header lacks {', '.join(missing) or 'frames'}")
        self._weights, self._state = metadata["weights"], metadata["state"]
        self._settings = self._read_settings(metadata["settings"])
        self.frames = int(metadata["frames"])

    def check_settings(self, settings: Mapping[str, str]) -> None:
        """Raise UserError where the conversation was held with other settings than these."""
        told = [
            f"{key}: {saved!s:.80}, here {here}"
            for key in [*settings, *sorted(set(self._settings) - set(settings))]
            if (saved := self._settings.get(key, _NO)) != (here := settings.get(key, _NO))
        ]
        if told:
            more = f"; and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
            raise self._problem(
                f"was saved with other settings: {'; '.join(told[:_TOLD])}{more}; name the "
                "CHECKPOINT and the device that it was saved with"
            )

    def read(self, identity: Identity, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors, on the CPU.

        Args:
            identity: of the model that is to go on.
            like: what its own state consists of: names, shapes and dtypes.

        Raises:
            UserError: the conversation is of another model, or damaged.
        """
        self.check_settings(identity.settings)
        if self._weights != identity.weights:
            raise self._problem(
                f"was saved with other weights (fingerprint {self._weights:.12}, here "
                f"{identity.weights:.12}); name the CHECKPOINT that it was saved with"
            )
        with safe_open(self._path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            if set(slices) != set(like) or any(
                slices[name].get_shape() != list(value.shape) for name, value in like.items()
            ):
                raise self._problem("is damaged: its tensors aren't those of this model's state")
            tensors = {name: opened.get_tensor(name) for name in slices}
        if fingerprint(tensors) != self._state or any(
            tensors[name].dtype != value.dtype for name, value in like.items()
        ):
            raise self._problem("is damaged: its tensors aren't those that were saved")
        return tensors

    def _read_settings(self, text: str) -> dict[str, Any]:
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise self._problem(f"is damaged: its settings are no JSON: {error}") from error
        if not isinstance(settings, dict):
            raise self._problem("is damaged: its settings are no JSON object")
        return settings

    def _problem(self, what: str) -> UserError:
        return UserError(f"--load-state: {self._path} {what}")


def check_new(path: Path) -> list[str]:
    """Why a conversation can't be saved as `path`, a line each; nothing is ever overwritten."""
    if path.exists() or path.is_symlink():
        return [f"--save-state: {path} exists; nothing is ever overwritten: name a new file"]
    if not path.absolute().parent.is_dir():
        return [f"--save-state: {path.absolute().parent} is no folder; create it first"]
    return []
