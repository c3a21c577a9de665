"""The inner loop of TTT layers as pure functions on plain tensors; imports torch alone.

state = mlp_state(W1, b1, W2, b2, batch_size)            # or linear_state(W1, b1, batch_size),
                                                         # deep_mlp_state(weights, biases, …)
out, state = ttt_mlp(q, k, v, eta, ln_weight, ln_bias, state, mini_batch_size=16)
"""

from torch._ops import OpOverload

from ttt_dist.ops.implementations import describe_scan
from ttt_dist.ops.reference import reference_scan
from ttt_dist.ops.rope import apply_rope, rope_table, stream_positions
from ttt_dist.ops.scan_op import SCAN
from ttt_dist.ops.state import (
    MLP_LAYERS,
    InnerState,
    deep_mlp_state,
    linear_state,
    mlp_state,
    weight_names,
)
from ttt_dist.ops.token_losses import token_losses
from ttt_dist.ops.ttt_linear import ttt_linear
from ttt_dist.ops.ttt_mlp import ttt_mlp

# Operators whose outputs selective activation checkpointing should save rather than recompute.
SAVED_OPS: tuple[OpOverload, ...] = (SCAN,)

__all__ = [
    "MLP_LAYERS",
    "SAVED_OPS",
    "InnerState",
    "apply_rope",
    "deep_mlp_state",
    "describe_scan",
    "linear_state",
    "mlp_state",
    "reference_scan",
    "rope_table",
    "stream_positions",
    "token_losses",
    "ttt_linear",
    "ttt_mlp",
    "weight_names",
]
