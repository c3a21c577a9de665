"""Where this project keeps what it can make again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """`ttt-dist` in the user's cache folder (XDG_CACHE_HOME or ~/.cache); may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt-dist"
