"""What every implementation of a whole scan is given, and the shape of what it keeps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScanInputs:
    """Arguments of one scan; shapes as in `ttt_dist.ops.scan_op`."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    gamma: Tensor
    beta: Tensor
    weights: list[Tensor]
    pending: list[Tensor]
    end: Tensor
    mini_batch_size: int
    causal: bool
    eps: float
    group_size: int
    compiled: bool

    @property
    def mini_batches(self) -> int:
        """The last one may be shorter."""
        return -(-self.q.shape[2] // self.mini_batch_size)

    @property
    def group_starts(self) -> range:
        """First mini-batch of every group."""
        return range(0, self.mini_batches, self.group_size)


def empty_borders(inputs: ScanInputs) -> list[Tensor]:
    """Room for the weights before every group: `[groups, B H, rows + 1, columns]` a layer."""
    borders = []
    for W in inputs.weights[::2]:
        B, H, rows, columns = W.shape
        borders.append(W.new_empty(len(inputs.group_starts), B * H, rows + 1, columns))
    return borders
