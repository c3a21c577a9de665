"""Ops and RoPE against tensors made by the public TTT code (tests/assets/goldens)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from ttt_dist.ops import (
    apply_rope,
    linear_state,
    mlp_state,
    reference_scan,
    rope_table,
    ttt_linear,
    ttt_mlp,
)

pytestmark = pytest.mark.usefixtures("either_code")

GOLDENS = Path(__file__).parents[1] / "assets" / "goldens"
# That code truncates GELU's constants, which moves outputs by 1e-9 and gradients by 1e-8;
# TTT-Linear has no GELU and agrees to 1e-14.
TOLERANCE = {"mlp": 1e-7, "linear": 1e-13}
OPS = {"mlp": (ttt_mlp, mlp_state), "linear": (ttt_linear, linear_state)}
INPUTS = ("q", "k", "v", "eta", "ln_weight", "ln_bias")


def load(name):
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def error(found, expected):
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


OP_GOLDENS = sorted(path.stem for path in GOLDENS.glob("op_*.safetensors"))


def test_all_op_goldens_are_there():
    assert len(OP_GOLDENS) == 6


@pytest.mark.parametrize("by", ["op", "reference"])
@pytest.mark.parametrize("name", OP_GOLDENS)
def test_op_golden(name, by):
    golden, meta = load(name)
    inner = name.split("_")[1]
    op, make_state = OPS[inner]
    weights = [w for w in ("W1", "b1", "W2", "b2") if w in golden]
    x = {n: golden[n].requires_grad_() for n in (*INPUTS, *weights)}
    state = make_state(*(x[w] for w in weights), golden["q"].shape[0])
    settings = {
        "mini_batch_size": int(meta["mini_batch_size"]),
        "causal": meta["causal"] == "true",
        "inner_eps": float(meta["inner_eps"]),
    }
    if by == "op":
        # Groups that don't divide the number of mini-batches.
        settings["checkpoint_group_size"] = 3
    else:
        op = reference_scan
    out, after = op(*(x[n] for n in INPUTS), state, **settings)
    (out * golden["grad_out"]).sum().backward()

    errors = {"out": error(out, golden["out"])}
    errors |= {f"grad.{n}": error(x[n].grad, golden[f"grad.{n}"]) for n in x}
    for w in weights:
        key = f"state_after_full.{w}"
        if key in golden:
            errors[key] = error(getattr(after, w), golden[key])
    assert max(errors.values()) < TOLERANCE[inner], errors
    if "causal" in name.split("_"):
        assert any(key.startswith("state_after_full") for key in errors)


@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_layer_golden_through_rope_target_and_op(inner):
    """TTT-Video's layer composed of pure functions: fixes RoPE's pairs, base and positions."""
    golden, meta = load(f"layer_{inner}_noncausal")
    p = {n[6:]: t.requires_grad_() for n, t in golden.items() if n.startswith("param.")}
    x = golden["x"].requires_grad_()
    B, L, D = x.shape
    H, C = int(meta["num_heads"]), int(meta["mini_batch_size"])
    d = D // H
    q, k, v = (
        F.linear(x, p[f"{w}.weight"], p[f"{w}.bias"]).unflatten(-1, (H, d)).transpose(1, 2)
        for w in ("wq", "wk", "wv")
    )
    cos, sin = rope_table(d, C)
    positions = torch.arange(L)
    q, k = (apply_rope(F.normalize(t, dim=-1), cos, sin, positions) for t in (q, k))
    u = v - k
    gamma, beta = p["ttt_norm_weight"], p["ttt_norm_bias"]
    normalised = (u - u.mean(-1, keepdim=True)) / (u.std(-1, keepdim=True) + 1e-8)
    v = gamma[:, None] * normalised + beta[:, None] + k
    gate = torch.einsum("bld,hd->bhl", x, p["learnable_ttt_lr_weight"][:, 0])
    gate = torch.sigmoid(gate + p["learnable_ttt_lr_bias"])
    eta = float(meta["base_lr"]) * gate / (d * C)
    op, make_state = OPS[inner]
    state = make_state(*(p[w] for w in ("W1", "b1", "W2", "b2") if w in p), B)
    out, _ = op(
        q, k, v, eta, gamma, beta, state,
        mini_batch_size=C, causal=False, inner_eps=float(meta["inner_eps"]),
    )  # fmt: skip
    out = out.transpose(1, 2).flatten(2)
    out = F.layer_norm(out, (D,), p["post_norm.weight"], p["post_norm.bias"], eps=1e-6)
    y = F.linear(out, p["wo.weight"], p["wo.bias"])
    (y * golden["grad_y"]).sum().backward()

    errors = {"y": error(y, golden["y"]), "grad.x": error(x.grad, golden["grad.x"])}
    errors |= {f"grad.{n}": error(t.grad, golden[f"grad.{n}"]) for n, t in p.items()}
    assert max(errors.values()) < 1e-7, errors
