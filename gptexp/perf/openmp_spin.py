"""How long an OpenMP thread that waits for the others keeps its core before it sleeps."""

import os
import re
import sys
from pathlib import Path

SPIN_COUNT = 2_000
"""Times that a waiting thread looks whether the others have arrived; GNU's OpenMP has it look 300,000 times.

Where other processes want the cores, a thread that spins keeps the very thread that it waits for from running.
"""


def prepare() -> None:
    """Before torch is loaded: have threads of GNU's OpenMP sleep soon, unless the user has set how they wait.

    The runtime reads its environment once, when it is loaded. Intel's and LLVM's ignore this setting.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def active() -> str | None:
    """The spin count that torch's threads have, or None where the runtime chose it or is not GNU's."""
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    gnu = "/libgomp.so" in loaded and not re.search(r"/lib(iomp5|omp)\.so", loaded)
    return os.environ.get("GOMP_SPINCOUNT") if gnu else None
