"""Which frames of a sample a rank computes in the Depformer, where frames do not see each other."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class FrameSharing(Protocol):
    """How frames are shared among ranks that hold the same samples."""

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's frames of `x`, which is the same on all ranks; the same number everywhere."""
        ...

    def all(self, own: Tensor, dim: int, frames: int) -> Tensor:
        """All ranks' frames, the first `frames` of them, from each rank's own."""
        ...


class AllFrames:
    """One rank computes every frame."""

    def own(self, x: Tensor, dim: int) -> Tensor:
        return x

    def all(self, own: Tensor, dim: int, frames: int) -> Tensor:
        return own
