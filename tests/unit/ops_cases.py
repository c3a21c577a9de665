"""Random inputs for the op tests."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from ttt_dist.ops import (
    deep_mlp_state,
    linear_state,
    mlp_state,
    ttt_linear,
    ttt_mlp,
    weight_names,
)

DEEP = {f"mlp {depth}": depth for depth in (3, 4, 5)}
DEPTHS = {"linear": 1, "mlp": 2, **DEEP}
OPS = {"mlp": ttt_mlp, "linear": ttt_linear, **dict.fromkeys(DEEP, ttt_mlp)}
FRAMES = ("q", "k", "v", "eta")


@dataclass
class Case:
    """Leaves of a random problem; `x` holds frames, norms and initial weights by name."""

    inner: str
    x: dict[str, torch.Tensor]
    settings: dict = field(default_factory=dict)

    @property
    def batch_size(self):
        return self.x["q"].shape[0]

    @property
    def length(self):
        return self.x["q"].shape[2]

    def fresh(self):
        weights = [self.x[n] for n in weight_names(DEPTHS[self.inner])]
        if self.inner in DEEP:
            return deep_mlp_state(weights[::2], weights[1::2], self.batch_size)
        return (mlp_state if self.inner == "mlp" else linear_state)(*weights, self.batch_size)

    def run(self, state, start=0, stop=None, op=None, **settings):
        """Frames `[start, stop)` of every lane."""
        frames = [self.x[n][:, :, start:stop] for n in FRAMES]
        norms = (self.x["ln_weight"], self.x["ln_bias"])
        op = op or OPS[self.inner]
        return op(*frames, *norms, state, **(self.settings | settings))

    def run_pieces(self, lengths, state=None, **settings):
        state = state or self.fresh()
        outs, start = [], 0
        for n in lengths:
            out, state = self.run(state, start, start + n, **settings)
            outs.append(out)
            start += n
        assert start == self.length
        return torch.cat(outs, dim=2), state


def make_case(inner, B, H, L, d=6, C=4, *, seed=0, dtype=torch.float64, **settings):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    x = {name: normal(B, H, L, d) for name in ("q", "k", "v")}
    # Large enough that a few tokens change what the next one reads by tens of percent.
    x["eta"] = (torch.rand(B, H, L, generator=g, dtype=torch.float64) / C).to(dtype)
    x["ln_weight"] = 1 + normal(H, d, scale=0.2)
    x["ln_bias"] = normal(H, d, scale=0.2)
    widths = [d, *[3 * d] * (DEPTHS[inner] - 1), d]
    for i, (rows, columns) in enumerate(pairwise(widths), start=1):
        x[f"W{i}"], x[f"b{i}"] = (
            normal(H, rows, columns, scale=0.4),
            normal(H, 1, columns, scale=0.2),
        )
    for t in x.values():
        t.requires_grad_()
    return Case(inner, x, {"mini_batch_size": C, **settings})


def objective(out, state, seed=1):
    """A random linear function of outputs and of all tensors of the returned state."""
    g = torch.Generator().manual_seed(seed)
    tensors = [out, *state.weights, *state.pending]
    return sum(
        (t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)).sum()
        for t in tensors
    )


def gradients(value, tensors):
    return dict(zip(tensors, torch.autograd.grad(value, list(tensors.values())), strict=True))


def relative(found, expected):
    assert found.shape == expected.shape
    scale = expected.norm()
    return ((found - expected).norm() / scale if scale > 0 else found.norm()).item()


def state_errors(found, expected):
    """Relative error by tensor; offsets must be equal."""
    assert torch.equal(found.offset, expected.offset)
    a, b = found.tensors(), expected.tensors()
    return {n: relative(a[n], b[n]) for n in a if n != "offset"}
