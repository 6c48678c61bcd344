"""Imports Lightning sooner."""

import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from types import ModuleType

# What torchmetrics loads, where it is installed, for metrics of sound, pictures and translations.
_UNUSED = ("matplotlib", "nltk", "pandas", "regex", "scipy", "torchaudio", "torchvision", "transformers")


def import_lightning() -> None:
    """Import torchmetrics and Lightning without the packages that only other metrics than ours need.

    torchmetrics, which Lightning itself imports, loads whatever it finds installed: transformers and scipy alone
    are three of eight seconds on two cores. Here they seem absent until it is loaded, and torchmetrics then leaves
    out the metrics that need them. A package that is loaded already stays as it is.
    """
    import torch  # noqa: F401  (it must see everything)

    hidden = _Hidden({name for name in _UNUSED if name not in sys.modules})
    sys.meta_path.insert(0, hidden)
    try:
        import torchmetrics  # noqa: F401
    finally:
        sys.meta_path.remove(hidden)
    from lightning_utilities.core.imports import package_available

    package_available.cache_clear()
    import lightning.pytorch  # noqa: F401


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
