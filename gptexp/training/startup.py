"""What must be settled before torch is loaded."""

import os

from gptexp.training.kernels import prepare_kernels

SPINS = 20_000
"""Times that a thread of torch looks whether the others are so far before it sleeps; GNU's OpenMP has it look 300,000
times. On a machine with nothing else to do a step takes as long (1,000 would cost 2 % of it); where other processes
want the processors, the threads would keep them from the very thread that they wait for, and a step would take several
times as long."""


def prepare_torch(fast_mkl: bool = True) -> None:
    """What torch's speed and last digits depend on and must be settled before it is loaded.

    Args:
        fast_mkl: the setting `hardware.fast_mkl`.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    prepare_kernels(fast_mkl)
