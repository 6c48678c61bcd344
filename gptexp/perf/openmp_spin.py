"""How long an OpenMP thread that waits for the others keeps its core before it sleeps."""

import os
import re
import sys
from pathlib import Path

SPIN_COUNT = 2_000
"""How often a waiting thread checks for the others before it sleeps; the default of GNU's OpenMP is 300,000 times.

When other processes use the cores, a thread that spins may keep the very thread it waits for from running.
"""


def prepare() -> None:
    """Before torch is loaded, make threads of GNU's OpenMP sleep soon, unless the user has set how they wait.

    The runtime reads its environment once, when it is loaded. Intel's and LLVM's runtimes ignore this setting.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def active() -> str | None:
    """The spin count of torch's threads; None if the runtime chose it, or is not GNU's."""
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    gnu = "/libgomp.so" in loaded and not re.search(r"/lib(iomp5|omp)\.so", loaded)
    return os.environ.get("GOMP_SPINCOUNT") if gnu else None
