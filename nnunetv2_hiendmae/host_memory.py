"""What becomes of freed memory on a CPU: kept for the next step, or given back to the system."""

import ctypes
import os
import platform
import sys

# of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
CHOSEN_BY_USER = ("MALLOC_", "GLIBC_TUNABLES")
# a gradient or activation is at least so large
LARGE_BYTES = 1 << 20
# bytes in a unit of `ru_maxrss`, the peak of a process
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def set_freed_memory(keep: bool) -> bool:
    """Keeps what this process frees, so that the next training step need not ask for it again; or gives every large
    tensor back at once.

    By default glibc gives a step's gradients and activations back and gets them page by page again, depending on where
    they happened to lie: a tenth of a step's time, in some runs and not in others. Kept, they cost what the peak costs.
    Given back, memory is not broken into pieces that no tensor fits into: three quarters of the peak of MiM with blocks
    computed twice, for half more time. What the user has set is left as it is, and so are other allocators.

    Returns:
        Whether anything was set.
    """
    if not _is_glibc() or any(name.startswith(CHOSEN_BY_USER) for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    # in this order: setting one of the thresholds ends glibc's own choice of both
    wanted = {_MMAP_THRESHOLD: LARGE_BYTES, _MMAP_MAX: 0 if keep else 1 << 16, _TRIM_THRESHOLD: -1 if keep else 1 << 17}
    return all(libc.mallopt(what, value) for what, value in wanted.items())


def give_back_freed_memory() -> None:
    """Gives the system what is free by now, once: other processes may need it more than what this one does next."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
