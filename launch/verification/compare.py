"""Two runs of `verify` held against each other: what is compared, and how far apart it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Relative differences allowed. float64: Moshi's norms and RoPE compute in float32 whatever the
# dtype. float32: sums in another order. bfloat16: a loss is a mean over many tokens, whose errors
# average out to below one rounding (2^-8); a gradient has gone through every layer twice, and may
# be off by a few.
TOLERANCE = {
    torch.float64: {"loss": 1e-6, "gradient norm": 1e-6, "gradient": 1e-6, "parameter": 1e-6},
    torch.float32: {"loss": 1e-5, "gradient norm": 1e-5, "gradient": 1e-5},
    torch.bfloat16: {"loss": 2**-8, "gradient norm": 4 * 2**-8},
}
# Some gradients are sums of both signs that nearly cancel (the bias of a head's inner learning rate
# is one number, summed over all tokens): unsharded float32 alone is off by about the tolerance from
# float64 there. Two float32 runs may then differ by three times what the unsharded one is measured
# to be off, and never by more than the limit.
ROUNDING_FACTOR, ROUNDING_LIMIT = 3.0, 1e-3
# A gradient is mathematically zero (the q and k of the Depformer's first step see one key) where
# float64 leaves less than this share of the whole gradient; it is compared with the whole.
ZERO_SHARE = 1e-10


@dataclass
class Trained:
    """What one run leaves: tensors whole and plain, by parameter; on rank 0 alone if sharded."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    parameters: dict[str, Tensor] = field(default_factory=dict)  # after the last
    gradient_spread: dict[str, float] = field(default_factory=dict)  # over ranks
    parameter_spread: dict[str, float] = field(default_factory=dict)
    max_norm: float = math.inf
    contexts: str = ""  # attention windows, read back


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, how far apart it is, and how far it may be.

    Attributes:
        dtype: of the runs compared.
        what: such as "loss" or "gradient".
        where: a parameter's name, or "step" and its number.
        error: relative difference.
        allowed: its tolerance.
    """

    dtype: str
    what: str
    where: str
    error: float
    allowed: float

    @property
    def failed(self) -> bool:
        """NaN fails."""
        return not self.error <= self.allowed


def compare(
    compute: torch.dtype, sharded: Trained, plain: Trained, exact: Mapping[str, Tensor]
) -> list[Check]:
    """All comparisons of two runs; `exact` are the unsharded float64 gradients."""
    dtype, allowed = str(compute).removeprefix("torch."), TOLERANCE[compute]
    checks = []
    if compute != torch.bfloat16:  # there the unsharded run keeps rounded weights
        for name, value in plain.start.items():
            error = _relative(sharded.start[name], value)
            checks.append(Check(dtype, "initial value", name, error, 0.0))
    for what, pairs in (
        ("loss", zip(sharded.losses, plain.losses, strict=True)),
        ("gradient norm", zip(sharded.norms, plain.norms, strict=True)),
    ):
        for step, (a, b) in enumerate(pairs, start=1):
            checks.append(Check(dtype, what, f"step {step}", abs(a - b) / abs(b), allowed[what]))
    if "gradient" in allowed:
        total = math.hypot(*(value.double().norm().item() for value in exact.values()))
        for name, value in plain.gradients.items():
            scale = total if exact[name].norm().item() < ZERO_SHARE * total else None
            rounding = ROUNDING_FACTOR * _relative(value, exact[name], scale)
            bound = max(allowed["gradient"], min(rounding, ROUNDING_LIMIT))
            missing = name not in sharded.gradients
            error = math.nan if missing else _relative(sharded.gradients[name], value, scale)
            checks.append(Check(dtype, "gradient", name, error, bound))
        for name in sharded.gradients.keys() - plain.gradients.keys():
            checks.append(Check(dtype, "gradient", name, math.nan, allowed["gradient"]))
    for what, spread in (
        ("gradient", sharded.gradient_spread),
        ("parameter", sharded.parameter_spread),
    ):
        if what in allowed:
            for name, error in spread.items():
                checks.append(Check(dtype, f"{what} across ranks", name, error, allowed[what]))
    if "parameter" in allowed and sharded.parameters:
        for name, value in plain.parameters.items():
            error = _relative(sharded.parameters[name], value)
            checks.append(Check(dtype, "parameter", name, error, allowed["parameter"]))
    return checks


def _relative(found: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """‖a − b‖ / ‖b‖, or over `scale`."""
    if found.shape != expected.shape:
        return math.nan
    size = expected.double().norm().item() if scale is None else scale
    return (found.double() - expected.double()).norm().item() / max(size, 1e-30)
