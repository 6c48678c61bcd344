"""Optimizations of dependencies, one per file. This folder's README gives each one's gain and how to turn it off."""

from gptexp.perf import mkl_kernels, openmp_spin


def prepare() -> None:
    """Do what must be done before torch is loaded; afterwards, do nothing.

    No result changes: `mkl_kernels.choose` decides later which kernels a run has.
    """
    openmp_spin.prepare()
    mkl_kernels.prepare()
