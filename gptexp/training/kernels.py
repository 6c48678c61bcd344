"""Has Intel's MKL, which multiplies torch's matrices, use its fastest kernels on other makers' processors, too."""

import ctypes
import os
import platform
import struct
import sys
from contextlib import suppress

QUESTION = b"mkl_serv_intel_cpu_true"
"""The function by which MKL asks whether the processor is Intel's; on others it takes slower kernels."""

YES = b"\xb8\x01\x00\x00\x00\xc3"  # x86-64: mov eax, 1; ret

_libraries: list[ctypes.CDLL] = []  # the one that answers, once it is loaded
_declined: list[bool] = []  # not empty once a run before torch was loaded did not want it


def prepare_kernels(wanted: bool = True) -> bool:
    """Before torch is loaded: under Linux, have MKL treat any processor with AVX2 as it treats Intel's.

    Loads a library of one function, which the dynamic linker finds before MKL's own of that name; no file is
    changed. On AMD's Zen 2 a product takes a quarter less time; it is of the same precision, with other last digits.
    In a process that has loaded torch before, nothing is done; see `kernels_conflict`.

    Source: the pull request pytorch/builder#1245, which advises builders of torch for AMD to preload such a library.

    Args:
        wanted: the setting `hardware.fast_mkl`.

    Returns:
        whether this process has those kernels.
    """
    if not _libraries and "torch" not in sys.modules and gains(_about_processor()):
        if not wanted:
            _declined.append(True)
            return False
        with suppress(OSError, AttributeError):  # no code but that of files may run, or Python lacks the call
            file = os.memfd_create("mkl_kernels")
            os.write(file, shared_library(QUESTION, YES))
            # The file stays open, for the linker knows the library by this name.
            _libraries.append(ctypes.CDLL(f"/proc/self/fd/{file}", ctypes.RTLD_GLOBAL))
    return bool(_libraries)


def kernels_conflict(wanted: bool) -> str | None:
    """What is wrong when an earlier run of this process was to have other kernels: torch keeps those.

    Args:
        wanted: the setting `hardware.fast_mkl`.
    """
    if wanted == bool(_libraries) or (wanted and not _declined):
        return None
    return (f"hardware.fast_mkl={str(wanted).lower()}: an earlier run of this process had it otherwise, and torch "
            "keeps the kernels that it was loaded with; give each value a command of its own")  # fmt: skip


def _about_processor() -> str:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return ""
    try:
        with open("/proc/cpuinfo") as file:
            return file.read().partition("\n\n")[0]
    except OSError:
        return ""


def gains(about: str) -> bool:
    """Whether a processor of this paragraph of /proc/cpuinfo runs faster kernels than MKL would choose for it."""
    return "GenuineIntel" not in about and {"avx2", "fma"} <= set(about.split())


def shared_library(name: bytes, code: bytes) -> bytes:
    """An ELF shared library for x86-64 that exports one function.

    The file is mapped twice: its code to be run, and at `data` what the dynamic linker writes to.

    Source: System V Application Binary Interface, chapters 4 and 5.

    Args:
        name: the function's.
        code: its instructions, which do not depend on where they lie.
    """
    strings = b"\0" + name + b"\0"
    headers = 64 + 4 * 56
    symbols, hashes, names = headers + 6 * 16, headers + 6 * 16 + 2 * 24, headers + 6 * 16 + 2 * 24 + 5 * 4
    start = names + len(strings)
    size, data = start + len(code), 0x10000
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian, version 1
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0)  # shared, x86-64
    load, dynamic, stack, run, write, page = 1, 2, 0x6474E551, 5, 6, 0x1000
    segments = [
        (load, run, 0, 0, 0, size, size, page),
        (load, write, 0, data, data, size, size, page),
        (dynamic, write, headers, data + headers, data + headers, 6 * 16, 6 * 16, 8),
        (stack, write, 0, 0, 0, 0, 0, 16),
    ]
    # DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_NULL
    entries = [(4, hashes), (5, names), (6, symbols), (10, len(strings)), (11, 24), (0, 0)]
    symbol = struct.pack("<IBBHQQ", 1, 0x12, 0, 1, start, len(code))  # a global function
    table = struct.pack("<5I", 1, 2, 1, 0, 0)  # one bucket, two symbols; the bucket begins with symbol 1
    return (
        header
        + b"".join(struct.pack("<IIQQQQQQ", *segment) for segment in segments)
        + b"".join(struct.pack("<QQ", *entry) for entry in entries)
        + bytes(24) + symbol + table + strings + code
    )  # fmt: skip
