"""A recording as the model meets it: delayed, with initial tokens, cut where no target is lost.

Moshi's codebooks run behind the text by their delays, and the model computes step s from step
s - 1. For the recording as a whole these steps are those of `TTTMoshi.steps`; pieces are cut
out of them, not of the codes, so that neither a delayed code nor a border's target falls out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NO_CODE = -1  # no target, and a zero embedding


def delayed_steps(
    codes: torch.Tensor, delays: Sequence[int], initial: Sequence[int]
) -> torch.Tensor:
    """The steps of a recording, `[R, F + 1]` in the codes' dtype.

    Args:
        codes: `[R, F]`, text first.
        delays: of every row, in frames.
        initial: every row's token before its first code.

    Step 0 holds the initial tokens; step s from 1 to F holds of row k the code of frame
    `s - 1 - delays[k]`, or the initial token before there is one. As in Moshi's own training, a
    row's last `delays[k]` codes are never reached.

    Raises:
        ValueError: not one delay, 0 or above, and one token for each row.
    """
    rows, frames = codes.shape
    if len(delays) != rows or len(initial) != rows or min(delays) < 0:
        raise ValueError(
            f"delays, initial: found {list(delays)}, {list(initial)}, allowed are {rows} delays of "
            "0 or above and as many tokens"
        )
    steps = torch.tensor(list(initial), dtype=codes.dtype)[:, None].repeat(1, frames + 1)
    for row, delay in enumerate(delays):
        steps[row, 1 + delay :] = codes[row, : max(0, frames - delay)]
    return steps


def piece_of_steps(steps: torch.Tensor, piece: int, frames: int) -> torch.Tensor:
    """Piece `piece` of a recording's steps `[R, F + 1]`: int64 `[R, T + 1]` for T = `frames`.

    The first T are inputs and the last T their targets; its last step is the next piece's first.
    Steps after the recording's end are -1.
    """
    cut = torch.full((steps.shape[0], frames + 1), NO_CODE, dtype=torch.int64)
    found = steps[:, piece * frames : piece * frames + frames + 1]
    cut[:, : found.shape[1]] = found
    return cut
