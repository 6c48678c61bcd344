"""Lightning is imported without the heavy packages that other metrics of torchmetrics would load."""

import subprocess
import sys

HEAVY = ("scipy", "transformers", "matplotlib")


def test_heavy_packages_stay_out_and_can_be_imported_afterwards() -> None:
    """In a process of its own; transformers, which the parity tests need, and with it scipy may be installed."""
    program = f"""
import sys
from importlib.util import find_spec
from gptexp.training.startup import import_lightning
installed = [name for name in {HEAVY} if find_spec(name)]
finders = sys.meta_path[:]
import_lightning()
assert "lightning.pytorch" in sys.modules
assert sys.meta_path == finders
print([name for name in installed if name in sys.modules])
from lightning_utilities.core.imports import RequirementCache, package_available
for name in installed:
    assert package_available(name) and RequirementCache(name)
    __import__(name)
print(installed)
"""
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    loaded, installed = map(eval, out.splitlines())
    assert loaded == []
    assert {"matplotlib", "transformers"} <= set(installed)


def test_a_package_that_is_loaded_stays_whole() -> None:
    program = """
import matplotlib
from gptexp.training.startup import import_lightning
import_lightning()
from torchmetrics.utilities.imports import _MATPLOTLIB_AVAILABLE
import matplotlib.pyplot
print(bool(_MATPLOTLIB_AVAILABLE))
"""
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert out == "True\n"
