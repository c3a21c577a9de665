"""LayerNorm over features that may be spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttt_dist.placement import BY_HEAD, gather_shards, to_local


class ShardedLayerNorm(nn.LayerNorm):
    """LayerNorm over all `D` features, of which a rank may hold only its own heads'.

    `weight` and `bias` `[D]` are plain, or DTensors sharded by head; `forward` takes and gives the
    matching local features. Statistics are computed in float32 (float64 for float64 inputs) and
    combined from each rank's mean and sum of squared deviations (Chan et al., 1979): summing
    squares would lose digits where the mean is large.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D / ranks]` of any float dtype to the same shape, in float32 (float64)."""
        weight = to_local(self.weight, grad_placements=BY_HEAD)
        bias = to_local(self.bias, grad_placements=BY_HEAD)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if x.shape[-1] == self.normalized_shape[0]:
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        mean = x.mean(dim=-1, keepdim=True)  # [..., 1]
        deviation = (x - mean).square().sum(dim=-1, keepdim=True)
        # [..., 1, 2] of each rank -> [..., ranks, 2]
        own = torch.stack([mean, deviation], dim=-1)
        means, deviations = gather_shards(own, self.weight, dim=own.dim() - 2).unbind(dim=-1)
        global_mean = means.mean(dim=-1, keepdim=True)  # ranks hold equally many features
        between = (means - global_mean).square() * x.shape[-1]
        variance = (deviations + between).sum(dim=-1, keepdim=True) / self.normalized_shape[0]
        return (x - global_mean) * torch.rsqrt(variance + self.eps) * weight + bias
