"""The TTT layer: projections, rotary embedding, target, inner learning rate, scan, norm, output."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttt_dist.config import TTTConfig
from ttt_dist.norm import ShardedLayerNorm
from ttt_dist.ops import (
    InnerState,
    apply_rope,
    deep_mlp_state,
    linear_state,
    mlp_state,
    rope_table,
    stream_positions,
    ttt_linear,
    ttt_mlp,
    weight_names,
)
from ttt_dist.placement import BY_HEAD, BY_INPUT, REPLICATED, enter_shards, sum_shards, to_local
from ttt_dist.reading import Reading

POST_NORM_EPS = 1e-6
STD_EPS = 1e-8
LENGTH_EPS = 1e-12
INIT_STD = 0.02


class TTTLayer(nn.Module):
    """A sequence layer whose memory is a small network per head, trained while it reads.

    Learning to (Learn at Test Time), arXiv 2407.04620; parameter names as in TTT-Video (arXiv
    2504.05298). Parameters may be plain tensors or, under tensor parallelism, DTensors sharded by
    head; the computation is on this rank's own heads either way.
    """

    def __init__(
        self,
        config: TTTConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        # Whether the scan's own elementwise code runs compiled; `parallel.compilation` decides.
        self.compiled = False
        # Called with each `Reading`, where the parameters are gathered; set by `moshi.probe` alone.
        self.probe: Callable[[Reading], None] | None = None
        D, H, d = config.model_dim, config.num_heads, config.head_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **factory))

        self.wq = nn.Linear(D, D, **factory)
        self.wk = nn.Linear(D, D, **factory)
        self.wv = nn.Linear(D, D, **factory)
        self.wo = nn.Linear(D, D, **factory)
        self.learnable_ttt_lr_weight = parameter(H, 1, D)
        self.learnable_ttt_lr_bias = parameter(H, 1)
        self.ttt_norm_weight = parameter(H, d)
        self.ttt_norm_bias = parameter(H, d)
        # The inner network's weights at a stream's start: W1, b1, W2, b2, …
        for number, (rows, columns) in enumerate(pairwise(config.inner_widths), start=1):
            self.register_parameter(f"W{number}", parameter(H, rows, columns))
            self.register_parameter(f"b{number}", parameter(H, 1, columns))
        self.post_norm = ShardedLayerNorm(D, eps=POST_NORM_EPS, **factory)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initial values of TTT.md: N(0, 0.02) for weights, 0 for biases, 1 for norm weights."""
        with torch.no_grad():
            for name, value in self.named_parameters():
                initial_value(name, value, generator)

    def inner_parameters(self) -> list[nn.Parameter]:
        """`W1, b1, W2, b2, …`: the learned initial weights of the inner network."""
        return [getattr(self, name) for name in weight_names(len(self.config.inner_widths) - 1)]

    def initial_state(self, batch_size: int) -> InnerState:
        """The state before the first frame: the learned initial weights of this rank's heads.

        Differentiable in the parameters; tensors `[B, H, ...]` as in `ttt_dist.ops`.
        """
        own = [self._own_heads(parameter) for parameter in self.inner_parameters()]
        weights, biases = own[::2], own[1::2]
        if self.config.inner_model == "linear":
            return linear_state(weights[0], biases[0], batch_size)
        if self.config.mlp_layers == 2:
            return mlp_state(weights[0], biases[0], weights[1], biases[1], batch_size)
        return deep_mlp_state(weights, biases, batch_size)

    def forward(
        self,
        x: Tensor,
        state: InnerState | None = None,
        frame_mask: Tensor | None = None,
        begins: Tensor | None = None,
    ) -> tuple[Tensor, InnerState]:
        """Read `L` frames.

        Args:
            x: `[B, L, D]`, plain; under tensor parallelism the same on all ranks of its axis.
            state: what an earlier call on the same streams returned; None at a stream's start.
            frame_mask: `[B, L]` bool, False for padded frames at the end: they leave the state
                untouched.
            begins: `[B]` bool, True for lanes whose stream begins with this call: they start from
                the learned initial weights, whatever `state` holds. `state` must be fresh.

        Returns:
            `y [B, L, D]` in x's dtype, plain (the same on all ranks of the axis), and the state,
            with tensors of this rank's own heads.
        """
        C = self.config.mini_batch_size
        # All paths from x, to q, k, v and eta, run through own heads: one sum for all gradients.
        x_local = enter_shards(x, like=self.wq.weight)  # [B, L, D]
        if state is None:
            state = self.initial_state(x.shape[0])
        elif begins is not None:
            state = self._begun(state, begins)
        positions = stream_positions(state.offset, x.shape[1])  # [B, L]

        q, k, v = (self._project(layer, x_local) for layer in (self.wq, self.wk, self.wv))
        cos, sin = rope_table(self.config.head_dim, C, base=self.config.rope_base, device=x.device)
        q = apply_rope(unit_vectors(q), cos, sin, positions)  # [B, H, L, d]
        k = apply_rope(unit_vectors(k), cos, sin, positions)
        norm_weight = self._own_heads(self.ttt_norm_weight)  # [H, d]
        norm_bias = self._own_heads(self.ttt_norm_bias)
        v = reconstruction_target(k, v, norm_weight, norm_bias)
        eta = self._inner_learning_rate(x_local)  # [B, H, L]
        if frame_mask is not None:
            eta = eta * frame_mask[:, None, :]

        q, k, v = (each.to(x.dtype) for each in (q, k, v))
        out, after = self.scan_op()(
            q,
            k,
            v,
            eta,
            norm_weight,
            norm_bias,
            state,
            mini_batch_size=C,
            causal=self.config.causal,
            inner_eps=self.config.inner_eps,
            checkpoint_group_size=self.config.checkpoint_group_size,
            compiled=self.compiled,
        )
        if self.probe is not None:
            initial = self.initial_state(len(x)).weights
            norm = (norm_weight, norm_bias)
            self.probe(Reading(self.config, q, k, v, eta, *norm, state, after, initial, out))
        out = out.transpose(1, 2).flatten(2)  # [B, L, own H * d]
        out = self.post_norm(out).to(x.dtype)
        y = F.linear(out, to_local(self.wo.weight, grad_placements=BY_INPUT).to(x.dtype))
        y = sum_shards(y, like=self.wo.weight)
        # Added once, after the reduction: each rank's own copy would count it `tp` times.
        return y + to_local(self.wo.bias, grad_placements=REPLICATED).to(x.dtype), after

    def scan_op(self) -> Callable[..., tuple[Tensor, InnerState]]:
        """The inner loop that `forward` runs; another one may have the same arguments."""
        return ttt_mlp if self.config.inner_model == "mlp" else ttt_linear

    def _begun(self, state: InnerState, begins: Tensor) -> InnerState:
        """`state` with the learned initial weights in the lanes that begin."""
        if not state.fresh:
            raise ValueError("begins: the lanes' state must be at the border of a mini-batch")
        lanes = begins[:, None, None, None]
        initial = self.initial_state(len(begins)).weights
        # Gradients reach the initial weights from the lanes that take them.
        return InnerState.at_border(
            [torch.where(lanes, new, old) for new, old in zip(initial, state.weights, strict=True)]
        )

    def _own_heads(self, parameter: Tensor) -> Tensor:
        return to_local(parameter, grad_placements=BY_HEAD)

    def _project(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """`[B, L, D]` to this rank's heads `[B, H, L, d]`, at least float32."""
        weight = self._own_heads(linear.weight).to(x.dtype)
        y = F.linear(x, weight, self._own_heads(linear.bias).to(x.dtype))
        return _at_least_float32(y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2))

    def _inner_learning_rate(self, x: Tensor) -> Tensor:
        """`eta [B, H, L]`: base_lr * sigmoid(gate) / (d * C), at least float32."""
        x = _at_least_float32(x)
        weight = self._own_heads(self.learnable_ttt_lr_weight).squeeze(1).to(x.dtype)  # [H, D]
        bias = self._own_heads(self.learnable_ttt_lr_bias).squeeze(1).to(x.dtype)  # [H]
        gate = torch.sigmoid(F.linear(x, weight, bias)).transpose(1, 2)
        return gate * (self.config.base_lr / (self.config.head_dim * self.config.mini_batch_size))


def initial_value(name: str, value: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill one TTT parameter in place with its initial value, chosen by its name (TTT.md).

    Args:
        name: the parameter's name; only its end counts, e.g. `"wq.bias"`, `"W1"`.
        value: the tensor to fill.
        generator: source of the normal numbers.
    """
    if re.search(r"(bias|\bb\d)$", name):
        value.zero_()
    elif name.endswith("norm.weight") or name.endswith("norm_weight"):
        value.fill_(1.0)
    else:
        value.normal_(0.0, INIT_STD, generator=generator)


def unit_vectors(x: Tensor) -> Tensor:
    """`x` `[..., d]` divided by its length; zeros stay zeros.

    As `torch.nn.functional.normalize`, whose gradient at zero is 10^12 times what comes in: a frame
    without any token (-1 in all rows) is a zero here while biases are zero.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length.clamp_min(LENGTH_EPS), 1.0)


def reconstruction_target(k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the inner network learns to give for `k`: the normalised `v - k`, plus `k`.

    Args:
        k, v: `[B, H, L, d]`; weight, bias: `[H, d]`, the inner LayerNorm's.

    Returns:
        `[B, H, L, d]`. The standard deviation is the unbiased one, as in TTT-Video.
    """
    u = v - k
    mean = u.mean(dim=-1, keepdim=True)
    std = u.std(dim=-1, keepdim=True, correction=1)
    # All values alike: 0 over any number, whose gradient would be 10^8 times what comes in.
    normalised = (u - mean) / torch.where(std > 0, std + STD_EPS, 1.0)
    return weight[:, None, :].to(u.dtype) * normalised + bias[:, None, :].to(u.dtype) + k


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
