"""Imports torch and Lightning: sooner, and so that torch shares the machine with others."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from types import ModuleType
from typing import Any

from gptexp import perf
from gptexp.console import importing

# What torchmetrics loads, where it is installed, for metrics of sound, pictures and translations.
_UNUSED = ("matplotlib", "nltk", "pandas", "regex", "scipy", "torchaudio", "torchvision", "transformers")

COMPILER = "torch._dynamo"
"""torch.compile's own package. It is as slow to import as torch itself, and only a run that compiles needs it."""


def import_lightning() -> None:
    """Import torch, torchmetrics and Lightning without the packages that only other metrics and runs than ours need.

    torchmetrics, which Lightning itself imports, loads whatever it finds installed: transformers and scipy alone
    are three of eight seconds on two cores. Here they seem absent until it is loaded, and torchmetrics then leaves
    out the metrics that need them. A package that is loaded already stays as it is. Lightning imports torch.compile's
    package for the name of a class, which is lent to it.
    """
    perf.prepare()
    with importing():
        _import_lightning()


def _import_lightning() -> None:
    import torch  # noqa: F401  (it must see everything)

    hidden = _Hidden({name for name in _UNUSED if name not in sys.modules})
    sys.meta_path.insert(0, hidden)
    try:
        import torchmetrics  # noqa: F401
    finally:
        sys.meta_path.remove(hidden)
    from lightning_utilities.core.imports import package_available

    package_available.cache_clear()
    loaded = set(sys.modules)
    try:
        with _compiler_lent():
            importlib.import_module("lightning.pytorch")
    except (ImportError, AttributeError):  # another version of Lightning, which needs more of the compiler
        for name in set(sys.modules) - loaded:
            if name.partition(".")[0] == "lightning":
                del sys.modules[name]
        importlib.import_module("lightning.pytorch")


@contextmanager
def _compiler_lent() -> Iterator[None]:
    """In here, `torch._dynamo` is what Lightning takes from it when it is imported; afterwards, it is to be imported.

    A compiled model is told by the real class, once that is loaded. What Lightning marks as not to be compiled, its
    own logging, is never called by what we compile, a model's forward pass; so it needs no mark.
    """
    if COMPILER in sys.modules:
        yield
        return
    lent = ModuleType(COMPILER)
    vars(lent).update(_LENT)
    sys.modules[COMPILER] = lent
    try:
        yield
    finally:
        if sys.modules.get(COMPILER) is lent:
            del sys.modules[COMPILER]


class _Compiled(type):
    """The type of a class whose instances are torch's compiled modules."""

    def __instancecheck__(cls, instance: object) -> bool:
        real = getattr(sys.modules.get(COMPILER), "OptimizedModule", cls)
        return real is not cls and isinstance(instance, real)  # not loaded yet: nothing has been compiled


class _OptimizedModule(metaclass=_Compiled):
    """Stands for `torch._dynamo.OptimizedModule`."""


def _unmarked(fn: Any = None, *_: Any, **__: Any) -> Any:
    """Stands for `torch._dynamo.disable`, as a decorator with or without arguments."""
    return fn if fn is not None else _unmarked


_LENT = {"OptimizedModule": _OptimizedModule, "disable": _unmarked}


class _Hidden(MetaPathFinder):
    """The first of Python's finders, for which `names` are not installed."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> None:
        """Refuse to find a hidden package; pass any other on to the next finder."""
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        """Refuse to find a hidden package's version."""
        if context is not None and context.name in self.names:
            raise PackageNotFoundError(context.name)
        return iter(())
