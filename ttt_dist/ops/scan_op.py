"""The scan as a `torch.library` operator, opaque to autograd, compilers and checkpointing.

One call is one node: selective activation checkpointing can keep its outputs (`SAVED_OPS`), so that
a recomputed layer doesn't run the scan's forward a third time.

    q k v [B, H, L, d], eta [B, H, L]; gamma, beta [H, d]; weights (W1, b1, …) [B, H, …]; pending
    like weights, or empty; end int64 [B]: position after each lane's last frame. Position 0 is the
    first one of a mini-batch in all lanes. eta, gamma, beta, weights, pending: compute dtype.

Returned borders, the weights before every group, `[groups, B H, rows + 1, columns]` a layer, are
there for backward alone: no gradient flows through them. With `compiled` the elementwise part of
tensor code is compiled inside the operator, which stays opaque to compilers around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ttt_dist.ops.implementations import Implementation, implementation
from ttt_dist.ops.scan_inputs import ScanInputs, empty_borders

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor eta, Tensor gamma, Tensor beta, Tensor[] weights, "
    "Tensor[] pending, Tensor end, int mini_batch_size, bool causal, float eps, int group_size, "
    "bool compiled"
)
_TENSORS = 9  # how many of them are tensors or lists of tensors
_ARGUMENTS = len(fields(ScanInputs))

# Compilers hand the operators tensors with the strides that eager code would.
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)

Outputs = tuple[Tensor, list[Tensor], list[Tensor]]


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """The scan decides itself what runs in which dtype: autocast would take the state to bf16."""
    # The meta device has none to switch off, and compilers can't trace the question.
    if device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _inputs(args: Sequence[Any]) -> ScanInputs:
    q, k, v, eta, gamma, beta, weights, pending, *rest = args
    return ScanInputs(q, k, v, eta, gamma, beta, list(weights), list(pending), *rest)


def _implementation(x: ScanInputs) -> Implementation:
    return implementation(len(x.weights) // 2, x.q.device, x.q.dtype, x.weights[0].dtype)


def _scan(*args: Any) -> Outputs:
    inputs = _inputs(args)
    # One grad mode, whoever calls: compiled code exists once a mode.
    with torch.no_grad(), without_autocast(inputs.q.device.type):
        return _implementation(inputs).forward(inputs)


def _scan_backward(*args: Any) -> list[Tensor]:
    *forward_args, borders, d_out, d_weights = args
    inputs = _inputs(forward_args)
    with torch.no_grad(), without_autocast(inputs.q.device.type):
        return _implementation(inputs).backward(inputs, list(borders), d_out, list(d_weights))


def _scan_fake(*args: Any) -> Outputs:
    x = _inputs(args)
    weights = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in x.weights]
    return torch.empty_like(x.q, memory_format=torch.contiguous_format), weights, empty_borders(x)


def _scan_backward_fake(*args: Any) -> list[Tensor]:
    x = _inputs(args[:_ARGUMENTS])
    tensors = (x.q, x.k, x.v, x.eta, x.gamma, x.beta, *x.weights, *x.pending)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x = _inputs(inputs)
    # Gradients that nobody asks for stay None: those of the borders are as large as these are.
    ctx.set_materialize_grads(False)
    ctx.counts = (len(x.weights), len(x.pending))
    ctx.settings = inputs[_TENSORS:]
    tensors = (x.q, x.k, x.v, x.eta, x.gamma, x.beta, *x.weights, *x.pending, x.end)
    ctx.save_for_backward(*tensors, *output[2])


def _backward(
    ctx: Any, d_out: Tensor | None, d_weights: list[Tensor | None], _: list[Tensor | None]
) -> tuple[Any, ...]:
    W, P = ctx.counts
    saved = list(ctx.saved_tensors)
    frames, saved = saved[:6], saved[6:]
    weights, pending, end, borders = saved[:W], saved[W : W + P], saved[W + P], saved[W + P + 1 :]
    if d_out is None:
        d_out = torch.zeros_like(frames[0])
    d_weights = [
        torch.zeros_like(w) if d is None else d for d, w in zip(d_weights, weights, strict=True)
    ]
    grads = torch.ops.ttt_dist.scan_backward(
        *frames, weights, pending, end, *ctx.settings, borders, d_out, d_weights
    )
    nothing = [None] * (1 + len(ctx.settings))
    return (*grads[:6], grads[6 : 6 + W], grads[6 + W :], *nothing)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "the scan's backward is written by hand and has no derivative of its own: "
        "ttt_dist.ops.dual_form computes the same scan by autograd, to any order"
    )


# The calls below `torch.library.custom_op`, which would import torch's compiler at the first call.
_LIBRARY = torch.library.Library("ttt_dist", "DEF")
_LIBRARY.define(f"scan({_INPUTS}) -> (Tensor, Tensor[], Tensor[])", tags=_TAGS)
_LIBRARY.define(
    f"scan_backward({_INPUTS}, Tensor[] borders, Tensor d_out, Tensor[] d_weights) -> Tensor[]",
    tags=_TAGS,
)
_LIBRARY.impl("scan", _scan, "CompositeExplicitAutograd")
_LIBRARY.impl("scan_backward", _scan_backward, "CompositeExplicitAutograd")
torch.library.register_fake("ttt_dist::scan", _scan_fake, lib=_LIBRARY)
torch.library.register_fake("ttt_dist::scan_backward", _scan_backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "ttt_dist::scan", _backward, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd("ttt_dist::scan_backward", _no_second_derivative, lib=_LIBRARY)

SCAN = torch.ops.ttt_dist.scan.default
SCAN_BACKWARD = torch.ops.ttt_dist.scan_backward.default


def _products_of_a_mini_batch(d: int, h: int | None, C: int) -> tuple[int, int]:
    """Multiplications of one mini-batch and head, `(forward, backward)`, biases left out.

    Products with the state: forward 7 (TTT-Linear 3), backward forward's again and 14 (6) more.
    (TTT-MLP's backward leaves out the updates after a group's last mini-batch, counted here.)
    Products among tokens, `C x C`: forward 4 (2), backward forward's again and 8 (4) more.
    """
    if h is None:
        return 3 * C * d * d + 2 * C * C * d, 9 * C * d * d + 6 * C * C * d
    with_state, among_tokens = C * d * h, C * C * (d + h)
    return 7 * with_state + 2 * among_tokens, 21 * with_state + 6 * among_tokens


def _flops(
    backward: bool,
    q: Any, k: Any, v: Any, eta: Any, gamma: Any, beta: Any, weights: Any, pending: Any, end: Any,
    mini_batch_size: int, *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    B, H, L, d = q
    h = weights[0][-1] if len(weights) > 2 else None
    counts = _products_of_a_mini_batch(d, h, mini_batch_size)
    return 2 * counts[backward] * B * H * -(-L // mini_batch_size)


register_flop_formula(torch.ops.ttt_dist.scan)(partial(_flops, False))
register_flop_formula(torch.ops.ttt_dist.scan_backward)(partial(_flops, True))
