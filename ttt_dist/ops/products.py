"""Batched matrix products of the scan: operands of one dtype, sums in another.

The scan keeps its state in float32 whatever its inputs are. Where q, k, v are bfloat16, both
operands of every product are rounded to bfloat16, the dtype in which a GPU multiplies fastest, and
sums are float32 ones, as in a GPU's tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Products:
    """Products of `[N, rows, inner]` with `[N, inner, columns]` operands of dtype `compute`.

    Attributes:
        operand: what operands are rounded to.
        compute: dtype of arguments, sums and results.
    """

    operand: torch.dtype
    compute: torch.dtype

    def mul(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """`a b`, into the contiguous `out` where given."""
        if self.operand == self.compute:
            return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
        result = self._rounded(a, b)
        return result if out is None else out.copy_(result)

    def add(
        self, total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """`total + alpha a b`, into the contiguous `out` where given, else in place."""
        out = total if out is None else out
        if self.operand == self.compute:
            return torch.baddbmm(total, a, b, alpha=alpha, out=out)
        return torch.add(total, self._rounded(a, b), alpha=alpha, out=out)

    def _rounded(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.to(self.operand), b.to(self.operand)
        if a.is_cuda:
            return torch.bmm(a, b, out_dtype=self.compute)
        # A CPU would round the sums too; products of rounded operands are exact in float32.
        return torch.bmm(a.to(self.compute), b.to(self.compute))
