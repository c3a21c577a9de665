"""What is measured on the tp axis alone: DTensor words, the sharded norm, one layer's traffic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.flop_counter import FlopCounterMode

from parallel.frame_sharing import SharedFrames
from parallel.mesh import Mesh
from parallel.tensor_parallel import split_layer
from tests.distributed import tiny
from tests.distributed.measure import relative_errors, worst
from ttt_dist.moshi.attention import AttentionWindow, attend
from ttt_dist.moshi.build import build_model, transformer_layers
from ttt_dist.norm import ShardedLayerNorm
from ttt_dist.placement import PARTIAL, place_into, to_local


def placement_words(mesh: Mesh) -> dict[str, Any]:
    """`to_local`, `place_into` and the sharded norm on the tp axis."""
    assert mesh.tp is not None
    axis = mesh.tp
    rank, ranks = axis.get_local_rank(), axis.size()
    like = DTensor.from_local(torch.zeros(3, 2), axis, [Shard(1)], run_check=False)  # [3, 2 ranks]
    local = torch.randn(3, 2, requires_grad=True)
    placed = place_into(local, like)
    result: dict[str, Any] = {
        "placed_values": torch.equal(placed.to_local(), local),
        "placed_shape": list(placed.shape) == [3, 2 * ranks],
    }
    to_local(placed * 3.0, grad_placements=[Shard(1)]).sum().backward()
    result["round_trip_gradient"] = torch.equal(local.grad, torch.full((3, 2), 3.0))
    try:
        place_into(torch.zeros(3, 1), like)
        result["wrong_shape"] = "accepted"
    except ValueError as error:
        result["wrong_shape"] = str(error)
    # A replicated tensor that each rank uses with a factor of its own: 1 + 2 + ... on every rank.
    shared = torch.ones(2, requires_grad=True)
    replicated = DTensor.from_local(shared, axis, [Replicate()], run_check=False)
    (to_local(replicated, grad_placements=PARTIAL) * (rank + 1)).sum().backward()
    result["partial_gradient"] = shared.grad.tolist()

    # Seven frames shared out and put together again: the same values, the gradient counted once.
    torch.manual_seed(0)
    frames = SharedFrames(axis)
    x = torch.randn(2, 7, 3, requires_grad=True)
    cotangent = torch.randn(2, 7, 3)
    mine = frames.own(x, dim=1)
    together = frames.all(mine, dim=1, frames=7)
    together.backward(cotangent)
    result["frames"] = {
        "own": mine.shape[1],
        "values": torch.equal(together, x),
        "gradient": torch.allclose(x.grad, cotangent, rtol=1e-6),
        "integers": frames.own(torch.arange(7), dim=0).dtype == torch.int64,
    }

    # post_norm over all heads, where the mean is 1e4 times the spread.
    torch.manual_seed(0)
    size = 4 * ranks
    norm = ShardedLayerNorm(size, eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(2, 5, size) + 1e4
    cotangent = torch.randn(2, 5, size)
    exact = nn.LayerNorm(size, eps=1e-6).double()
    exact.load_state_dict({k: v.double() for k, v in norm.state_dict().items()})
    x_exact = x.double().requires_grad_()
    y_exact = exact(x_exact)
    y_exact.backward(cotangent.double())
    x_plain = x.clone().requires_grad_()
    y_plain = norm(x_plain)
    y_plain.backward(cotangent)
    plain_weight_gradient = norm.weight.grad.clone()
    own = slice(4 * rank, 4 * rank + 4)
    for name in ("weight", "bias"):
        full = getattr(norm, name).detach()
        setattr(
            norm,
            name,
            nn.Parameter(DTensor.from_local(full[own].clone(), axis, [Shard(0)], run_check=False)),
        )
    x_own = x[..., own].clone().requires_grad_()
    y_own = norm(x_own)
    y_own.backward(cotangent[..., own])

    def error(found: Tensor, expected: Tensor) -> float:
        return ((found.double() - expected).norm() / expected.norm()).item()

    result["norm"] = {
        "output": error(y_own, y_exact[..., own]),
        "input gradient": error(x_own.grad, x_exact.grad[..., own]),
        "weight gradient": error(norm.weight.grad.to_local(), exact.weight.grad[own]),
        "one device's weight gradient": error(plain_weight_gradient[own], exact.weight.grad[own]),
        "one device's output": error(y_plain[..., own], y_exact[..., own]),
        "one device's input gradient": error(x_plain.grad[..., own], x_exact.grad[..., own]),
    }
    return result


def layer_traffic(mesh: Mesh) -> dict[str, Any]:
    """Collectives of one hybrid layer on the tp axis, and its agreement with the unsplit layer."""
    assert mesh.tp is not None
    placement = tiny.ttt_placement(lm_config=tiny.WIDE_LM_CONFIG)
    plain, split = (
        transformer_layers(build_model(tiny.WIDE_LM_CONFIG, placement, device="cpu"))[1]
        for _ in range(2)
    )
    plain, split = plain.double(), split.double()
    split.load_state_dict(plain.state_dict())
    split_layer(split, mesh.tp)
    torch.manual_seed(0)
    x = torch.randn(2, tiny.FRAMES, tiny.WIDE_LM_CONFIG["dim"], dtype=torch.float64)
    x_plain, x_split = x.clone().requires_grad_(), x.clone().requires_grad_()
    counts: dict[str, Any] = {}
    with FlopCounterMode(display=False) as plain_work:
        y_plain = plain(x_plain)
        y_plain.square().sum().backward()
    with FlopCounterMode(display=False) as split_work:
        with CommDebugMode() as forward:
            y_split = split(x_split)
        with CommDebugMode() as backward:
            y_split.square().sum().backward()
    counts["work"] = split_work.get_total_flops() / plain_work.get_total_flops()
    for name, mode in (("forward", forward), ("backward", backward)):
        found = mode.get_comm_counts()
        counts[name] = {str(op).rsplit(".", 1)[-1]: n for op, n in found.items() if n}
    references = dict(plain.named_parameters())
    pairs = {n: (p.grad, references[n].grad) for n, p in split.named_parameters()}
    pairs |= {"x": (x_split.grad, x_plain.grad), "y": (y_split.detach(), y_plain.detach())}
    return counts | {"error": worst(relative_errors(pairs))}


def carried_window(mesh: Mesh) -> dict[str, Any]:
    """Attention in pieces on each rank's heads beside the unsplit module on the whole recording."""
    assert mesh.tp is not None
    torch.manual_seed(0)  # the same weights and frames on all ranks
    plain, split = (
        transformer_layers(build_model(tiny.WIDE_LM_CONFIG, None, device="cpu"))[0]
        for _ in range(2)
    )
    split.load_state_dict(plain.state_dict())
    split_layer(split, mesh.tp)
    for layer in (plain, split):
        layer.self_attn.context = tiny.OTHER_CONTEXT
    x = torch.randn(2, 150, tiny.WIDE_LM_CONFIG["dim"])
    x_plain, x_split = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_plain, _ = attend(plain.self_attn, x_plain, None)
    window = AttentionWindow.empty(split.self_attn, 2, device="cpu", dtype=x.dtype)
    outputs = []
    for piece in x_split.split((80, 3, 67), dim=1):  # several blocks, less than a window, a rest
        y, window = attend(split.self_attn, piece, window)
        outputs.append(y)
    y_split = torch.cat(outputs, dim=1)
    for y in (y_plain, y_split):
        y.square().sum().backward()
    references = dict(plain.self_attn.named_parameters())
    pairs = {n: (p.grad, references[n].grad) for n, p in split.self_attn.named_parameters()}
    pairs |= {"x": (x_split.grad, x_plain.grad), "y": (y_split.detach(), y_plain.detach())}
    return {"window": list(window.keys.shape), "error": worst(relative_errors(pairs))}
