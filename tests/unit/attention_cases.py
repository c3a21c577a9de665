"""Moshi's attention module beside one with packed projections."""

import torch
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import StreamingMultiheadAttention

from ttt_dist.moshi.attention import AttentionWindow
from ttt_dist.moshi.packed import pack_attention

H, D = 2, 16


def error(found, expected):
    scale = expected.norm()
    return ((found - expected).norm() / (scale if scale > 0 else 1.0)).item()


def attentions(context, rope="interleaved", dtype=torch.float32):
    """Moshi's own module, and one of the same weights with packed projections."""
    torch.manual_seed(0)
    embedding = None if rope is None else RotaryEmbedding(interleave=rope == "interleaved")
    stock, packed = (
        StreamingMultiheadAttention(D, H, causal=True, context=context, rope=embedding, dtype=dtype)
        for _ in range(2)
    )
    packed.load_state_dict(stock.state_dict())
    assert pack_attention(packed)
    return stock, packed


def empty(attention, dtype=torch.float32, batch_size=2):
    return AttentionWindow.empty(attention, batch_size, device="cpu", dtype=dtype)
