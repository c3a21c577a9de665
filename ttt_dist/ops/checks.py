"""Validation of a scan's arguments: every mistake named, all of them at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_dist.ops.state import InnerState, compute_dtype, weight_names

_OPERAND_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ScanArguments:
    """What a caller hands to a scan; `ttt_mlp` documents each, and its defaults."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    state: InnerState
    mini_batch_size: int
    causal: bool
    inner_eps: float
    checkpoint_group_size: int | None


def check_scan_arguments(op: str, depth: int, given: ScanArguments) -> None:
    """Raises a ValueError that lists each argument, what was found and what is expected."""
    q, eta, state = given.q, given.eta, given.state
    mini_batch_size, group_size = given.mini_batch_size, given.checkpoint_group_size
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(
            f"{op}: q has shape {list(q.shape)}, expected [B, H, L, d] with every size at least 1"
        )
    if q.dtype not in _OPERAND_DTYPES:
        allowed = ", ".join(str(t) for t in _OPERAND_DTYPES)
        raise ValueError(f"{op}: q is {q.dtype}, expected one of {allowed}")
    problems = []
    B, H, L, d = q.shape
    compute = compute_dtype(q.dtype)

    def check(name: str, t: Tensor, shape: list[int], dtypes: tuple[torch.dtype, ...]) -> None:
        if list(t.shape) != shape:
            problems.append(f"{name} has shape {list(t.shape)}, expected {shape}")
        if t.dtype not in dtypes:
            allowed = " or ".join(str(t) for t in dict.fromkeys(dtypes))
            problems.append(f"{name} is {t.dtype}, expected {allowed} (q is {q.dtype})")
        if t.device != q.device:
            problems.append(f"{name} is on {t.device}, expected {q.device} (that of q)")

    for name, t in {"k": given.k, "v": given.v}.items():
        check(name, t, [B, H, L, d], (q.dtype,))
    check("eta", eta, [B, H, L], (compute, q.dtype))
    for name, t in {"ln_weight": given.ln_weight, "ln_bias": given.ln_bias}.items():
        check(name, t, [H, d], (compute, q.dtype))

    if state.depth != depth:
        problems.append(
            f"state has {state.depth} inner layer(s), expected {depth}: "
            "mlp_state and deep_mlp_state belong to ttt_mlp, linear_state to ttt_linear"
        )
    else:
        h = state.W1.shape[-1]
        widths = [d, *[h] * (depth - 1), d]
        for i, name in enumerate(weight_names(depth)):
            rows = 1 if i % 2 else widths[i // 2]
            shape = [B, H, rows, widths[i // 2 + 1]]
            check(f"state.{name}", state.weights[i], shape, (compute,))
            check(f"state's pending {name}", state.pending[i], shape, (compute,))
    check("state.offset", state.offset, [B], (torch.int64,))

    if mini_batch_size < 1:
        problems.append(f"mini_batch_size is {mini_batch_size}, expected at least 1")
    elif state.mini_batch_size not in (None, mini_batch_size):
        problems.append(
            f"mini_batch_size is {mini_batch_size}, expected {state.mini_batch_size}, "
            "with which the state was carried so far"
        )
    if not given.inner_eps > 0:
        problems.append(f"inner_eps is {given.inner_eps}, expected a number above 0")
    if group_size is not None and group_size < 0:
        problems.append(f"checkpoint_group_size is {group_size}, expected None, 0 or more")
    # Asks the device, so only in the bidirectional form; a fresh state is known to fit.
    if not problems and not given.causal and not state.fresh and bool(state.offset.any()):
        problems.append(
            f"state.offset is {state.offset.tolist()}, expected 0 in every lane: with causal=False "
            "a sequence can be split at mini-batch borders only"
        )
    if problems:
        raise ValueError(f"{op}: " + "; ".join(problems))
