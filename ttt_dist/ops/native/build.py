"""Building and loading the C++ kernels.

Built for the processor at hand (`-march=native`), once for each version of the sources, compiler
and processor, into the user's cache folder. Nothing but a C++ compiler is needed: the kernels know
no headers of torch's or Python's, take plain pointers, and are called through `ctypes`, which lets
go of Python's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SWITCH = "TTT_DIST_NATIVE"
"""Environment variable: `0` leaves the kernels out."""

_FOLDER = Path(__file__).parent
_SOURCE = "scan.cpp"
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
    "-shared", "-fPIC", "-pthread",
)  # fmt: skip
_SECONDS = 300  # building takes about 5


@dataclass(frozen=True)
class NativeLibrary:
    """The loaded kernels, or why there are none.

    Attributes:
        functions: None where they can't be used.
        told: one line: the file, or the reason.
    """

    functions: ctypes.CDLL | None
    told: str


def library() -> NativeLibrary:
    """The kernels, built if they aren't yet; warns once in a process where that fails."""
    if os.environ.get(SWITCH) == "0":
        return NativeLibrary(None, f"{SWITCH} is 0")
    return built()


@cache
def built() -> NativeLibrary:
    found = compiler()
    if found is None:
        return NativeLibrary(None, f"no C++ compiler found (CXX, {', '.join(_COMPILERS)})")
    command = [*found, *_FLAGS]
    name = f"scan-{_fingerprint(command)}.so"
    try:
        try:
            path = _build(command, _folder() / name)
            return NativeLibrary(ctypes.CDLL(str(path)), str(path))
        # No home, one that can't be written or that nothing may be run from, or a damaged file.
        except (OSError, RuntimeError):
            with tempfile.TemporaryDirectory() as folder:  # a loaded file may go
                path = _build(command, Path(folder) / name)
                return NativeLibrary(ctypes.CDLL(str(path)), f"{path}, removed once loaded")
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or str(error)
        reason = f"building or loading them with {shlex.join(found)} failed: {words.strip()[-500:]}"
        warnings.warn(
            f"the scan's C++ kernels are not used, its tensor code is slower on a CPU; {reason}. "
            f"{SWITCH}=0 asks for the tensor code",
            stacklevel=2,
        )
        return NativeLibrary(None, reason)


def compiler() -> list[str] | None:
    """The command of `CXX`, or the first compiler found."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        return asked
    paths = [path for name in _COMPILERS if (path := shutil.which(name))]
    return paths[:1] or None


def _fingerprint(command: list[str]) -> str:
    """Of all that the result depends on. A home folder may be shared by unlike machines."""
    digest = hashlib.sha256()
    for path in sorted(p for p in _FOLDER.iterdir() if p.suffix in (".h", ".cpp")):
        digest.update(path.read_bytes())
    program = Path(shutil.which(command[0]) or command[0])
    version = program.resolve().stat() if program.exists() else None
    changed = version and (version.st_size, version.st_mtime_ns)
    digest.update(repr((command, changed, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:20]


def _processor() -> list[str]:
    """What the first processor can do, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
    told = ("model name", "flags", "Features", "CPU part")
    return [next((line for line in lines if line.startswith(name)), "") for name in told]


def _folder() -> Path:
    """Where they are kept: `ttt-dist/kernels` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "ttt-dist" / "kernels"


def _build(command: list[str], path: Path) -> Path:
    """Compile to `path` unless it is there, which then appears whole.

    Ranks that start together wait for the first one's: as many compilers on one core would take
    longer than they may, and no file is replaced that another rank has loaded.
    """
    if path.exists():  # in a folder that may not be writable
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("a") as lock:
        with suppress(OSError):  # not on every file system; then each builds its own
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run(
                [*command, str(_FOLDER / _SOURCE), "-o", str(made)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
            made.replace(path)
    return path
