"""What `launch.benchmark` runs: shapes, random inputs, and the arithmetic that they need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_dist.config import TTTConfig
from ttt_dist.layer import TTTLayer
from ttt_dist.ops import InnerState, linear_state, mlp_state, ttt_linear, ttt_mlp
from ttt_dist.ops.dual_form import dual_form
from ttt_dist.ops.state import compute_dtype

INIT_STD = 0.02  # of a TTT layer's initial weights
NORM_STD = 0.1  # of the norms' weights around 1 and biases around 0, so that no term vanishes

Inner = Literal["mlp", "linear"]
ScanOp = Callable[..., tuple[Tensor, InnerState]]
FAST: dict[str, ScanOp] = {"mlp": ttt_mlp, "linear": ttt_linear}


@dataclass(frozen=True)
class Case:
    """One scan or layer to measure.

    Attributes:
        inner: "mlp" or "linear", the latter with `h = d`.
        B, H, d, h, C, L: batch, heads, head_dim, hidden size, mini-batch size, frames.
        dtype: of the inputs, and so of the operands of matrix products.
    """

    inner: Inner
    B: int
    H: int
    d: int
    h: int
    C: int
    L: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        sizes = f"B {self.B} H {self.H} d {self.d} h {self.h} C {self.C} L {self.L:,}"
        return f"{self.inner} {sizes} {str(self.dtype).removeprefix('torch.')}"

    def mini_batches(self) -> list[int]:
        """Tokens of each mini-batch."""
        full, rest = divmod(self.L, self.C)
        return [self.C] * full + ([rest] if rest else [])


@dataclass(frozen=True)
class Drawn:
    """One repetition's inputs: `forward` reads `leaves`; `grad` is the gradient of its output."""

    forward: Callable[[], tuple[Tensor, InnerState]]
    leaves: dict[str, Tensor]
    grad: Tensor


Workload = Callable[[int], Drawn]  # a seed to fresh inputs; the same seed gives the same values


def inner_widths(case: Case) -> list[tuple[int, int]]:
    """Rows and columns of each weight of the inner network."""
    return [(case.d, case.h), (case.h, case.d)] if case.inner == "mlp" else [(case.d, case.d)]


def scan_workload(case: Case, op: ScanOp, **settings: Any) -> Workload:
    """The scan `op` on inputs as a TTT layer makes them: unit q and k, eta of its magnitude.

    Args:
        settings: further keywords of the op.
    """
    B, H, d, C, L = case.B, case.H, case.d, case.C, case.L
    compute = compute_dtype(case.dtype)

    def draw(seed: int) -> Drawn:
        generator = torch.Generator(case.device).manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=case.device, dtype=compute)
            return std * values

        q, k = (F.normalize(normal(B, H, L, d), dim=-1) for _ in range(2))
        frames = {
            "q": q.to(case.dtype),
            "k": k.to(case.dtype),
            "v": (normal(B, H, L, d) + k).to(case.dtype),
            "eta": torch.sigmoid(normal(B, H, L)) / (d * C),
            "ln_weight": 1.0 + normal(H, d, std=NORM_STD),
            "ln_bias": normal(H, d, std=NORM_STD),
        }
        weights = {}
        for layer, (rows, columns) in enumerate(inner_widths(case), start=1):
            weights[f"W{layer}"] = normal(H, rows, columns, std=INIT_STD)
            weights[f"b{layer}"] = normal(H, 1, columns, std=INIT_STD)
        leaves = {name: t.requires_grad_() for name, t in (frames | weights).items()}

        def forward() -> tuple[Tensor, InnerState]:
            fresh: Callable[..., InnerState] = mlp_state if case.inner == "mlp" else linear_state
            state = fresh(*weights.values(), batch_size=B)
            return op(*frames.values(), state, mini_batch_size=C, **settings)

        return Drawn(forward, leaves, normal(B, H, L, d).to(case.dtype))

    return draw


def layer_config(case: Case, group_size: int | None) -> TTTConfig:
    """The layer of `H` heads over `H d` features; `group_size` None leaves the layer's default."""
    config = TTTConfig(
        model_dim=case.H * case.d,
        num_heads=case.H,
        inner_model=case.inner,
        mini_batch_size=case.C,
        expansion=case.h // case.d,
    )
    return config if group_size is None else replace(config, checkpoint_group_size=group_size)


class TwinLayer(TTTLayer):
    """The same layer around the slow twin, with the twin's own checkpoint groups."""

    def scan_op(self) -> ScanOp:
        def run(
            *tensors: Any, checkpoint_group_size: int | None, compiled: bool, **settings: Any
        ) -> tuple[Tensor, InnerState]:
            return dual_form(*tensors, **settings)

        return run


def layer_workload(
    case: Case, config: TTTConfig, kind: type[TTTLayer] = TTTLayer, *, compiled: bool = False
) -> Workload:
    """A TTT layer with initial parameters drawn anew, on `x [B, L, D]` of standard normals.

    `compiled`: the scan's own elementwise code; nothing around it.
    """

    def draw(seed: int) -> Drawn:
        generator = torch.Generator(case.device).manual_seed(seed)
        layer = kind(config, device=case.device, dtype=case.dtype)
        layer.compiled = compiled
        layer.reset_parameters(generator)
        shape = (case.B, case.L, config.model_dim)
        x, grad = (
            torch.randn(shape, generator=generator, device=case.device, dtype=case.dtype)
            for _ in range(2)
        )
        x.requires_grad_()
        leaves: dict[str, Tensor] = {"x": x, **dict(layer.named_parameters())}
        return Drawn(lambda: layer(x), leaves, grad)

    return draw


def scan_flops(case: Case) -> tuple[int, int]:
    """FLOP of the scan's forward and backward: a product `[m, n] @ [n, p]` is `2 m n p`.

    Counted, for every mini-batch and head: the state-sized products (tokens x d x h), 7 forward and
    14 backward for TTT-MLP, 3 and 6 for TTT-Linear, and the `C x C` ones, whole although half of
    each is masked. Not counted: elementwise work, and what checkpointing computes twice.
    """
    if case.inner == "mlp":
        forward, backward, state, inner = 7, 14, case.d * case.h, case.d + case.h
    else:
        forward, backward, state, inner = 3, 6, case.d * case.d, case.d
    tokens, squares = case.L, sum(c * c for c in case.mini_batches())
    each = 2 * case.B * case.H
    return (
        each * (forward * tokens * state + 2 * squares * inner),
        each * (backward * tokens * state + 4 * squares * inner),
    )


def flops_counted(case: Case, what: Literal["scan", "layer"]) -> str:
    """What `scan_flops` or `layer_flops` count, in words."""
    products = "7 + 14" if case.inner == "mlp" else "3 + 6"
    text = f"{products} state-sized products (forward + backward) and the C x C ones"
    return text if what == "scan" else f"{text}, projections and inner learning rate"


def layer_flops(case: Case) -> tuple[int, int]:
    """`scan_flops`, and the layer's four projections and its inner learning rate."""
    D = case.H * case.d
    projections = 2 * case.B * case.L * (4 * D * D + D * case.H)
    forward, backward = scan_flops(case)
    return forward + projections, backward + 2 * projections


def scan_bytes(case: Case) -> int:
    """Bytes that a scan's forward and backward have to move if all between them stays on chip.

    Counted: forward q, k, v, eta in and the output out; backward these four and the output's
    gradient in and four gradients out; state in and out, and its gradients likewise.
    """
    compute = compute_dtype(case.dtype).itemsize
    lanes = case.B * case.H
    state = sum((rows + 1) * columns for rows, columns in inner_widths(case))
    frames = case.L * (11 * case.d * case.dtype.itemsize + 3 * compute)
    return lanes * (frames + 4 * state * compute)


def gradients(drawn: Drawn, outputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of all leaves; outputs that depend on none of them are left out."""
    pairs = [(t, g) for t, g in zip(outputs, grads, strict=True) if t.requires_grad]
    return torch.autograd.grad(
        [t for t, _ in pairs], list(drawn.leaves.values()), [g for _, g in pairs]
    )


def outputs_and_gradients(drawn: Drawn, seed: int) -> dict[str, Tensor]:
    """Output, returned state, and the gradients of all leaves by name, for a comparison.

    The state's tensors get random gradients (`seed`) too, scaled to weigh about as much as the
    output's: training through carried states needs them.
    """
    out, state = drawn.forward()
    named = {f"state {n}": t for n, t in state.tensors().items() if t.is_floating_point()}
    generator = torch.Generator(out.device).manual_seed(seed)
    grads = [drawn.grad]
    for t in named.values():
        grad = torch.randn(t.shape, generator=generator, device=t.device, dtype=t.dtype)
        grads.append(grad / math.sqrt(max(t.numel(), 1)))
    found = gradients(drawn, [out, *named.values()], grads)
    results = {"output": out, **named, "state offset": state.offset}
    results |= {f"gradient of {n}": g for n, g in zip(drawn.leaves, found, strict=True)}
    return {name: t.detach() for name, t in results.items()}
