"""The memory benchmark's sequences: a random phrase comes back after a gap.

Moshi's first codebook plays a phrase of random symbols while the user's first codebook counts its
frames. A gap later the user's second codebook asks for them, frame by frame, and Moshi plays the
phrase again. In the gap the user chatters: random codes that mean nothing. Before and after, the
user is silent. There is no text, and Moshi has nothing else to say, so its losses are those of the
phrase and of its return.

    frame       …  1  2  3 … P   gap            …  1  2  3 … P
    Moshi          a  b  c … z   -                 a  b  c … z
    user 1         1  2  3 … P   random codes   -  -  -  - …    -     else 0
    user 2         -             -              1  2  3 … P           one frame ahead

There is always something to hear: a frame of -1 alone is embedded as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CODEBOOKS = 2  # of Moshi and of the user, each
ROWS = 1 + 2 * CODEBOOKS
CARD = 64  # codes of a codebook; all of them are symbols: what never comes takes steps to unlearn
MOSHI, COUNTING, ASKING = 1, 1 + CODEBOOKS, 2 + CODEBOOKS  # rows; the others hold -1
SILENCE = 0  # of the user
# A phrase begins in one of the first frames: anywhere in a mini-batch, and soon after the start.
BEGINNINGS = 16
NOTHING, NEW, RETURNING = 0, 1, 2  # kinds of frames


@dataclass(frozen=True)
class MemoryTask:
    """Sizes of a sequence.

    Args:
        frames: of the whole sequence.
        phrase_frames: of the phrase, and of its return.
        symbols: each frame of a phrase is one of them, all equally likely.

    Raises:
        ValueError: the codes don't suffice, or no gap fits.
    """

    frames: int
    phrase_frames: int = 5
    symbols: int = CARD

    def __post_init__(self) -> None:
        if not 2 <= self.symbols <= CARD or not 1 <= self.phrase_frames < CARD - 1:
            raise ValueError(f"{self}: allowed are 2 to {CARD} symbols, and fewer frames a phrase")
        if self.longest_gap < 0:
            raise ValueError(f"{self}: allowed are {2 * self.phrase_frames} frames or more")

    @property
    def longest_gap(self) -> int:
        """Frames between a phrase's last one and the first of its return, at most."""
        return self.frames - 2 * self.phrase_frames

    def draw(self, gaps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One sequence for every gap; where the phrase begins is random.

        Args:
            gaps: int64 `[N]`, frames; 0 to `longest_gap`.

        Returns:
            codes int32 `[N, ROWS, frames]`, -1 for none, and kinds int32 `[N, frames]`.
        """
        if int(gaps.min()) < 0 or int(gaps.max()) > self.longest_gap:
            raise ValueError(
                f"gaps: found {int(gaps.min())} to {int(gaps.max())} frames, allowed are 0 to "
                f"{self.longest_gap}"
            )
        N, P = len(gaps), self.phrase_frames

        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        # Of another range for every sequence: a number below 1 in its place.
        places = (self.longest_gap - gaps + 1).clamp(max=BEGINNINGS)
        begin = (torch.rand(N, generator=generator) * places).long()
        count = torch.arange(P)
        new = begin[:, None] + count  # [N, P]
        back = new + P + gaps[:, None]
        frame = torch.arange(self.frames)
        in_gap = (frame > new[:, -1:]) & (frame < back[:, :1])

        codes = torch.full((N, ROWS, self.frames), -1)
        numbers = (1 + count).expand(N, P)
        chatter = draw(P + 1, CARD, N, self.frames)
        codes[:, ASKING].scatter_(1, back - 1, numbers)
        asked = codes[:, ASKING] >= 0
        codes[:, COUNTING] = torch.where(in_gap, chatter, SILENCE).masked_fill(asked, -1)
        codes[:, COUNTING].scatter_(1, new, numbers)
        phrases = draw(0, self.symbols, N, P)
        codes[:, MOSHI].scatter_(1, new, phrases)
        codes[:, MOSHI].scatter_(1, back, phrases)
        kinds = torch.full((N, self.frames), NOTHING)
        kinds.scatter_(1, new, NEW).scatter_(1, back, RETURNING)
        return codes.int(), kinds.int()
