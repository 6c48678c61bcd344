"""Makes Intel's MKL, which multiplies torch's matrices, use its fastest kernels on other makers' processors, too.

MKL uses its fastest kernels if its function `mkl_serv_intel_cpu_true` returns true. The dynamic linker finds a function
of that name in a library that is loaded before torch, and MKL calls that one instead. No file is changed. The kernels
have the same precision and round differently, so results differ in their last digits.

MKL calls the function once per process, at its first product of matrices. Until then the answer can be chosen; then it
is final. The function counts its calls, so we know whether MKL called it at all.

Source: the pull request pytorch/builder#1245, which advises builders of torch for AMD to preload such a library.
"""

import ctypes
import os
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

QUESTION = b"mkl_serv_intel_cpu_true"
CALLS_AND_ANSWER = b"gptexp_calls_and_answer"
"""The library's data: two 32-bit numbers, how often the function was called and what it returns."""


@dataclass
class Library:
    """The loaded library; Python never unloads it."""

    data: ctypes.Array[ctypes.c_uint32]  # calls and answer, in the library's own memory
    chosen: bool | None = None  # what runs of this process asked for; None before the first


@cache  # loaded once per process
def prepare() -> Library | None:
    """Load the library, if torch is not loaded yet and this processor gains from it.

    Until `choose` is called, it gives MKL's own answer, and nothing changes.
    """
    if "torch" in sys.modules or not gains(first_processor()):
        return None
    with suppress(OSError, AttributeError, ValueError):  # a system that runs only code from files, or an older Python
        file = os.memfd_create("mkl_kernels")
        os.write(file, shared_library(QUESTION, CALLS_AND_ANSWER))
        # The file stays open, because the linker knows the library by this name.
        library = ctypes.CDLL(f"/proc/self/fd/{file}", ctypes.RTLD_GLOBAL)
        return Library((ctypes.c_uint32 * 2).in_dll(library, CALLS_AND_ANSWER.decode()))
    return None


def choose(wanted: bool) -> str | None:
    """Choose the kernels of this process, by the setting `hardware.fast_mkl`, before its first product of matrices.

    Returns:
        the problem, if an earlier run of this process chose otherwise and MKL keeps to that; else None.
    """
    library = prepare()
    if library is None:
        return None
    calls, _ = library.data
    if calls and library.chosen not in (None, wanted):
        return (f"hardware.fast_mkl={str(wanted).lower()}: an earlier run of this process had it otherwise, and MKL "
                "keeps the kernels that it began with; give each value a command of its own")  # fmt: skip
    if not calls:
        library.data[1] = wanted
    library.chosen = wanted
    return None


def active() -> bool:
    """Whether MKL called the function and got the answer true; a small product makes it call."""
    library = prepare()
    if library is None:
        return False
    import torch

    product = torch.ones(16, 16, dtype=torch.float32, device="cpu")
    torch.mm(product, product)
    calls, answer = library.data
    return bool(calls and answer)


def first_processor() -> str:
    """The first processor's part of Linux's /proc/cpuinfo; empty on other systems."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return ""


def gains(cpuinfo: str) -> bool:
    """Whether the processor of this paragraph of /proc/cpuinfo can run faster kernels than MKL would choose."""
    return "GenuineIntel" not in cpuinfo and {"avx2", "fma"} <= set(cpuinfo.split())


def shared_library(function: bytes, data: bytes) -> bytes:
    """An ELF shared library for x86-64 with a function that counts its calls and returns a number that can be set.

    The file is mapped twice: executable at 0, and writable at 0x10000, for the dynamic linker and the function.

    Source: System V Application Binary Interface, chapters 4 and 5; its AMD64 supplement.

    Args:
        function: its name.
        data: the name of two 32-bit numbers, the count and the value to return, both initially 0.
    """
    strings = b"\0" + function + b"\0" + data + b"\0"
    dynamic = 64 + 4 * 56  # behind the header of the file and those of four segments
    symbols = dynamic + 6 * 16
    hashes = symbols + 3 * 24
    names = hashes + 6 * 4
    start = names + len(strings)
    numbers = -(-(start + 20) // 8) * 8  # behind the code
    size, writable = numbers + 8, 0x10000
    # Offsets of the numbers count from the end of the instruction that uses them.
    code = b"\xf0\xff\x05" + struct.pack("<i", writable + numbers - (start + 7))  # lock inc dword ptr [rip + calls]
    code += b"\x8b\x05" + struct.pack("<i", writable + numbers + 4 - (start + 13))  # mov eax, [rip + answer]
    code += b"\xc3"  # ret
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian, version 1
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0)  # shared, x86-64
    load, dynamics, stack, run, write, page = 1, 2, 0x6474E551, 5, 6, 0x1000
    segments = [
        (load, run, 0, 0, 0, size, size, page),
        (load, write, 0, writable, writable, size, size, page),
        (dynamics, write, dynamic, writable + dynamic, writable + dynamic, 6 * 16, 6 * 16, 8),
        (stack, write, 0, 0, 0, 0, 0, 16),
    ]
    # DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_NULL
    entries = [(4, hashes), (5, names), (6, symbols), (10, len(strings)), (11, 24), (0, 0)]
    table = [
        struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0),
        struct.pack("<IBBHQQ", 1, 0x12, 0, 1, start, len(code)),  # a global function
        struct.pack("<IBBHQQ", 2 + len(function), 0x11, 0, 1, writable + numbers, 8),  # a global object
    ]
    file = (
        header
        + b"".join(struct.pack("<IIQQQQQQ", *segment) for segment in segments)
        + b"".join(struct.pack("<QQ", *entry) for entry in entries)
        + b"".join(table)
        + struct.pack("<6I", 1, 3, 1, 0, 2, 0)  # one bucket, three symbols: 1, then 2
        + strings
        + code
    )
    return file.ljust(size, b"\0")
