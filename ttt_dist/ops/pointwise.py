"""Where the scan's elementwise code is compiled: one pass over memory instead of one an operation.

A function of tensors, without matrix products, becomes one graph for the shapes and strides of its
first arguments, by torch's inductor. `torch.compile` would look at all of them again in every call:
on a CPU that takes 15 µs, which is what compiling saves on a mini-batch of usual size; without it a
call takes 4 µs. So a `Compiled` belongs to one scan, in which they stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]

# Shape, strides, dtype and device of a tensor.
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


class Compiled:
    """`function`, compiled at its first call; all further calls must have the same layouts.

    Args:
        function: of tensors alone; returns a tensor, a tuple of them, or None where it writes into
            its arguments.
        constants: keywords of the function.
    """

    def __init__(self, function: Function, **constants: float):
        self._function, self._constants = function, constants
        self._graph: Function | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        if self._graph is None:
            layouts = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors)
            self._graph = _graph(self._function, tuple(self._constants.items()), layouts)
        return self._graph(*tensors)


@cache
def _graph(
    function: Function, constants: tuple[tuple[str, float], ...], layouts: tuple[Layout, ...]
) -> Function:
    """Once in a process: compiling takes seconds."""
    # Both import torch's compiler, which takes seconds too.
    from torch._inductor import compile as compile_graph
    from torch.fx.experimental.proxy_tensor import make_fx

    examples = [
        torch.empty_strided(shape, stride, dtype=dtype, device=device)
        for shape, stride, dtype, device in layouts
    ]
    graph = make_fx(partial(function, **dict(constants)), tracing_mode="fake")(*examples)
    compiled: Function = compile_graph(graph, [*examples])
    return compiled


def ready(function: Function, compiled: bool, **constants: float) -> Function:
    """The function with its constants, as it is written or compiled."""
    return (Compiled if compiled else partial)(function, **constants)
