"""What one piece of so many frames takes through the tiny model with TTT; one JSON object.

    python -m tests.unit.hour_worker FRAMES none|layer|evaluate

`none` and `layer` are training steps by what is recomputed; the windows are the 7B's, 50 and 100.
"""

import json
import sys
import time

import torch

from launch.metrics import GIB, peak_memory_gib
from parallel.activation import checkpoint_layers
from tests.unit.moshi_cases import active_hybrid_model, clean_codes, set_windows


def peak() -> float:
    return peak_memory_gib(torch.device("cpu")) * GIB


def main(frames: int, mode: str) -> None:
    model = set_windows(active_hybrid_model(), ttt_context=50, other_context=100)
    codes = clean_codes(1, frames)
    if mode == "layer":
        checkpoint_layers(model, "layer")
    before, start = peak(), time.monotonic()
    with torch.set_grad_enabled(mode != "evaluate"):
        text, audio = model.step_losses(model.steps(codes))
        loss = text.sum() + audio.sum()
    if mode != "evaluate":
        loss.backward()
    seconds = time.monotonic() - start
    print(json.dumps({"bytes": peak() - before, "seconds": seconds, "loss": loss.item()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
