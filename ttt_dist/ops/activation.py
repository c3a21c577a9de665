"""GELU in its tanh form with two derivatives, by one sigmoid: `gelu(x) = x s(y)`,
`y = 2 sqrt(2/pi) (x + 0.044715 x³)`.

A sigmoid costs a third of a tanh on a CPU, and value and derivative share it. Results go into
buffers that the caller owns; nothing here is differentiable by autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt_dist.ops.pointwise import Compiled

_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715 * _LINEAR


class Gelu:
    """The function and its derivatives, with scratch memory of its own.

    Args:
        n, shape: arguments have this shape, or `[m, *shape]` with m up to n.
        like: gives dtype and device.
    """

    def __init__(self, n: int, shape: tuple[int, ...], like: Tensor):
        self._scratch = like.new_empty(3, n, *shape).unbind()
        self._ndim = len(shape)
        # Constants as tensors: sums with them take one pass over x rather than two.
        self._linear = like.new_full((), _LINEAR)
        self._minus_two_linear = like.new_full((), -2.0 * _LINEAR)

    def _buffer(self, i: int, x: Tensor) -> Tensor:
        return self._scratch[i][0] if x.ndim == self._ndim else self._scratch[i][: x.shape[0]]

    def _sigmoid_and_scale(self, x: Tensor, sigmoid: Tensor) -> tuple[Tensor, Tensor]:
        """`s(y)` and `y / x`."""
        scale = torch.addcmul(self._linear, x, x, value=_CUBIC, out=self._buffer(0, x))
        return torch.mul(scale, x, out=sigmoid).sigmoid_(), scale

    def _slope_(self, scale: Tensor) -> Tensor:
        """`y' = 3 y / x - 2 y'(0)`, in place of `y / x`."""
        return torch.add(self._minus_two_linear, scale, alpha=3.0, out=scale)

    def value(self, x: Tensor, out: Tensor) -> None:
        """Write `gelu(x)`; `out` may be strided."""
        sigmoid, _ = self._sigmoid_and_scale(x, self._buffer(1, x))
        torch.mul(x, sigmoid, out=out)

    def value_and_derivative(self, x: Tensor, value: Tensor, derivative: Tensor) -> None:
        """Write `gelu(x)`, and `gelu'(x) = s + x s (1 - s) y'`; `value` may be strided."""
        sigmoid, scale = self._sigmoid_and_scale(x, derivative)
        torch.mul(x, sigmoid, out=value)
        # x s (1 - s) y' = (g - g s) y'
        rest = torch.addcmul(value, value, sigmoid, value=-1.0, out=self._buffer(1, x))
        sigmoid.addcmul_(rest, self._slope_(scale))

    def curvature(self, x: Tensor, factor: Tensor) -> None:
        """Multiply `factor` by `gelu''(x) = p (4 y' - 2 y'(0) + (1 - 2 s) x y'²)`,
        `p = s (1 - s)`; x is overwritten."""
        sigmoid, scale = self._sigmoid_and_scale(x, self._buffer(1, x))
        slope = self._slope_(scale)
        p = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1.0, out=self._buffer(2, x))
        x.mul_(slope).mul_(slope).mul_(sigmoid.mul_(-2.0).add_(1.0))
        factor.mul_(x.add_(slope, alpha=4.0).sub_(2.0 * _LINEAR).mul_(p))


class CompiledGelu(Gelu):
    """`Gelu` in one pass over memory for arguments of `shape` and `[n, *shape]`.

    Its second derivative stays as it is written, which is no slower.
    """

    def __init__(self, n: int, shape: tuple[int, ...], like: Tensor):
        super().__init__(n, shape, like)
        self._n = n
        # By number of dims.
        self._value = {ndim: Compiled(_value) for ndim in (3, 4)}
        self._both = {ndim: Compiled(_value_and_derivative) for ndim in (3, 4)}

    def _fits(self, x: Tensor) -> bool:
        # Each further shape would be compiled anew.
        return x.ndim == self._ndim or x.shape[0] == self._n

    def value(self, x: Tensor, out: Tensor) -> None:
        if self._fits(x):
            self._value[x.ndim](x, out)
        else:
            super().value(x, out)

    def value_and_derivative(self, x: Tensor, value: Tensor, derivative: Tensor) -> None:
        if self._fits(x):
            self._both[x.ndim](x, value, derivative)
        else:
            super().value_and_derivative(x, value, derivative)


def gelu(compiled: bool, n: int, shape: tuple[int, ...], like: Tensor) -> Gelu:
    """As it is written, or compiled; arguments as of `Gelu`."""
    return (CompiledGelu if compiled else Gelu)(n, shape, like)


def _value(x: Tensor, out: Tensor) -> None:
    out.copy_(x * torch.sigmoid((_LINEAR + _CUBIC * x * x) * x))


def _value_and_derivative(x: Tensor, value: Tensor, derivative: Tensor) -> None:
    scale = _LINEAR + _CUBIC * x * x
    sigmoid = torch.sigmoid(scale * x)
    gelu = x * sigmoid
    value.copy_(gelu)
    derivative.copy_(sigmoid + (gelu - gelu * sigmoid) * (3.0 * scale - 2.0 * _LINEAR))
