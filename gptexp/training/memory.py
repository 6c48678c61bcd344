"""Keeps memory in the process that training frees and takes again at every step."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names for them, of malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of giving it back to the system; elsewhere, do nothing.

    By default large blocks are mapped anew each time, and the top of the heap is given back: a thousand page faults a
    step of a small GPT, which is some hundredths of its time. No digit changes. A process that holds much memory
    once keeps it until its end.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl, for one, has none
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        _ = mallopt(MMAP_THRESHOLD, 2**30) or mallopt(MMAP_THRESHOLD, 2**25)  # older ones refuse more than 32 MiB
