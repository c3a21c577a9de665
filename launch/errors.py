"""How a person's mistakes are told: all of them in one message, once, without a traceback."""

import os
import socket
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

EXIT_USER_ERROR = 2

# Ranks meet the same mistake within the skew of their imports. torchrun ends every process as soon
# as one has exited, so a rank that left first could silence rank 0: the others wait this long.
RANK_ZERO_GRACE_SECONDS = 15.0


class UserError(Exception):
    """Mistakes of the person who starts a run, each one line: what, where, found, allowed, fix."""

    def __init__(
        self, problems: Iterable[str] | str, *, title: str = "This run can't start"
    ) -> None:
        lines = [problems] if isinstance(problems, str) else list(problems)
        if not lines:
            raise ValueError("UserError needs at least one problem")
        self.problems: tuple[str, ...] = tuple(dict.fromkeys(lines))
        self.title = title
        super().__init__(str(self))

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{self.title}: {count} problem{'' if count == 1 else 's'}."
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems)])


def exit_with(error: UserError, *, grace_seconds: float = RANK_ZERO_GRACE_SECONDS) -> NoReturn:
    """Print `error` on rank 0 (environment variable RANK, default 0) and exit with code 2.

    Other ranks wait `grace_seconds` first. One that outlives the wait on rank 0's node met a
    mistake that rank 0 didn't (torchrun would have ended it), so it tells; on other nodes the first
    local rank tells, since a file may be missing on that node alone.
    """
    rank = int(os.environ.get("RANK", "0"))
    text = str(error)
    if rank != 0:
        time.sleep(grace_seconds)
        on_first_node = os.environ.get("GROUP_RANK", "0") == "0"
        if not on_first_node and os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(EXIT_USER_ERROR)
        text = f"[{socket.gethostname()}, rank {rank}] {text}"
    print(text, file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)
