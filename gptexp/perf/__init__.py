"""Optimizations of dependencies, one per file. This folder's README gives each one's gain and how to turn it off."""

from gptexp.perf import mkl_kernels, openmp_spin


def prepare() -> None:
    """Settle what must be settled before torch is loaded; afterwards, do nothing.

    It changes no result: `mkl_kernels.choose` says later which kernels a run has.
    """
    openmp_spin.prepare()
    mkl_kernels.prepare()
