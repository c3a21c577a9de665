"""C++ kernels of the scan for CPUs, built by this machine's compiler where they are first used."""

from ttt_dist.ops.native.build import SWITCH, NativeLibrary, compiler, library
from ttt_dist.ops.native.scan import scan_backward, scan_forward, suits

__all__ = [
    "SWITCH",
    "NativeLibrary",
    "compiler",
    "library",
    "scan_backward",
    "scan_forward",
    "suits",
]
