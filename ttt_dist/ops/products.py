"""Batched matrix products of the scan: operands of one dtype, sums in another.

The scan keeps its state in float32 whatever its inputs are. Where q, k, v are bfloat16, both
operands of every product are rounded to bfloat16, the dtype in which a GPU multiplies fastest, and
sums are float32 ones, as in a GPU's tensor cores. Biases, which ride along as one more row of the
weights, are not rounded: their errors would be the same for all tokens, and add up (gradients of a
4,096 frames long TTT-Linear were off float32's by up to 8e-3 instead of 4e-3).
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

    def mul(self, a: Tensor, b: Tensor, out: Tensor | None = None, bias: bool = False) -> Tensor:
        """`a b`, into the contiguous `out` where given.

        `bias`: `b`'s last row is a bias, and `a`'s last column, ones and zeros, says where it goes.
        """
        if self.operand == self.compute:
            return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
        result = self._rounded(a, b, bias)
        return result if out is None else out.copy_(result)

    def add(
        self,
        total: Tensor,
        a: Tensor,
        b: Tensor,
        alpha: float = 1.0,
        out: Tensor | None = None,
        bias: bool = False,
    ) -> Tensor:
        """`total + alpha a b`, into the contiguous `out` where given, else in place.

        `bias`: as in `mul`.
        """
        out = total if out is None else out
        if self.operand == self.compute:
            return torch.baddbmm(total, a, b, alpha=alpha, out=out)
        return torch.add(total, self._rounded(a, b, bias), alpha=alpha, out=out)

    def update(
        self, total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """As `add` for a `total` whose last row is a bias: `a`'s last row is ones and zeros."""
        if self.operand == self.compute:
            return self.add(total, a, b, alpha, out)
        rows = self._rounded(a[:, :-1], b, bias=False)
        # A sum of rows of b, not of rounded ones.
        change = torch.cat((rows, torch.bmm(a[:, -1:], b)), dim=1)
        return torch.add(total, change, alpha=alpha, out=total if out is None else out)

    def _rounded(self, a: Tensor, b: Tensor, bias: bool) -> Tensor:
        if bias:
            product = self._rounded(a[..., :-1], b[..., :-1, :], bias=False)
            return product.addcmul_(a[..., -1:], b[..., -1:, :])
        a, b = a.to(self.operand), b.to(self.operand)
        if a.is_cuda:
            return torch.bmm(a, b, out_dtype=self.compute)
        # A CPU would round the sums too; products of rounded operands are exact in float32.
        return torch.bmm(a.to(self.compute), b.to(self.compute))
