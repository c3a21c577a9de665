"""Moshi's packed projections and their outputs, in a form whose heads and features can be split.

Moshi packs q, k and v (and the two halves of its gated feed-forward) on dim 0 of one weight. Cut
along that dim, each rank would get rows of another projection, without an error. Kept as
`[parts, rows, inputs]` the same values are cut along `rows`: by head, by feature. On plain tensors
these modules compute bit for bit what `nn.Linear` computes with the stock weight.
"""

from __future__ import annotations

from moshi.modules.gating import ActivationGating
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from ttt_dist.placement import BY_BLOCK_ROW, BY_INPUT, enter_shards, sum_shards, to_local


class PackedLinear(nn.Module):
    """`parts` linear maps of one input, without bias: `[..., inputs]` to `[..., parts * rows]`.

    Under tensor parallelism `weight [parts, rows, inputs]` is a DTensor split by rows; the output
    then holds this rank's rows of every part, and the input's gradient is summed over ranks.
    """

    weight: nn.Parameter

    def __init__(self, stock: nn.Linear, parts: int) -> None:
        super().__init__()
        self.weight = _unflattened(stock, parts)

    def forward(self, x: Tensor) -> Tensor:
        return _project(x, self.weight)


class PackedProjection(nn.Linear):
    """`PackedLinear` of attention: streaming looks for an `nn.Linear` there."""

    def __init__(self, stock: nn.Linear, parts: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = stock.in_features, stock.out_features
        self.weight = _unflattened(stock, parts)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return _project(x, self.weight)


class OutputLinear(nn.Linear):
    """A linear map without bias whose inputs may be split over ranks; the output is summed."""

    def __init__(self, stock: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = stock.in_features, stock.out_features
        self.weight = stock.weight
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, to_local(self.weight, grad_placements=BY_INPUT))
        return sum_shards(y, like=self.weight)


def pack_attention(attention: StreamingMultiheadAttention) -> bool:
    """Give self-attention splittable projections; False where its weights are packed otherwise."""
    if attention.kv_repeat != 1 or attention.weights_per_step or attention.cross_attention:
        return False
    attention.in_projs[0] = PackedProjection(attention.in_projs[0], parts=3)
    attention.out_projs[0] = OutputLinear(attention.out_projs[0])
    return True


def pack_gating(gating: nn.Module | None) -> bool:
    """Give a gated feed-forward splittable projections; False for any other feed-forward."""
    if not isinstance(gating, ActivationGating):
        return False
    # ActivationGating calls its modules, instead of reading their weights, where the first is no
    # nn.Linear.
    gating.linear_in = PackedLinear(gating.linear_in, parts=2)
    gating.linear_out = OutputLinear(gating.linear_out)
    return True


def packed_parameters(model: nn.Module) -> set[str]:
    """Full names of the parameters whose stock shape is `[parts * rows, inputs]`."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (PackedLinear, PackedProjection))
    }


def stock_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model on one device, with the shapes of a release."""
    packed = packed_parameters(model)
    return {
        name: value.flatten(0, 1) if name in packed else value
        for name, value in model.state_dict().items()
    }


def _unflattened(stock: nn.Linear, parts: int) -> nn.Parameter:
    return nn.Parameter(stock.weight.data.unflatten(0, (parts, -1)))


def own_rows(weight: Tensor) -> Tensor:
    """This rank's rows of every part of `weight [parts, rows, inputs]`, as one matrix."""
    return to_local(weight, grad_placements=BY_BLOCK_ROW).flatten(0, 1)


def _project(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(enter_shards(x, like=weight), own_rows(weight))
