"""What a run does without until it is needed: packages for other metrics than ours, and torch.compile's."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY

HEAVY = ("scipy", "transformers", "matplotlib")


def python(program: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    """What a program prints, in a process of its own."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    loaded, installed = map(eval, python(program).splitlines())
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
    assert python(program) == "True\n"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_a_run_needs_no_compiler(optimizer: str, corpus: Path, tmp_path: Path) -> None:
    """From its beginning to its end."""
    program = """
import sys
from gptexp.train import main
try:
    main()
except SystemExit as stop:
    assert not stop.code
print([name for name in ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "wandb") if name in sys.modules])
"""
    arguments = [*TINY, f"optimizer={optimizer}", f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert python(program, *arguments, "logger=wandb").splitlines()[-1] == "[]"


def test_what_is_compiled_later_is_known_as_such() -> None:
    program = """
import sys
from gptexp.training.startup import import_lightning
import_lightning()
import torch
from lightning.fabric import wrappers
model = torch.nn.Linear(2, 2)
assert not isinstance(model, wrappers.OptimizedModule)
assert "torch._dynamo" not in sys.modules
compiled = torch.compile(model, backend="eager")
assert isinstance(compiled, wrappers.OptimizedModule) and not isinstance(model, wrappers.OptimizedModule)
assert wrappers._unwrap_compiled(compiled)[0] is model
x = torch.ones(1, 2)
assert torch.equal(compiled(x), model(x))
print(type(compiled).__name__, torch._dynamo.OptimizedModule is type(compiled))
"""
    assert python(program) == "OptimizedModule True\n"


def test_a_compiler_that_is_loaded_stays() -> None:
    program = """
import torch._dynamo
from gptexp.training.startup import import_lightning
import_lightning()
from lightning.fabric import wrappers
print(wrappers.OptimizedModule is torch._dynamo.OptimizedModule)
"""
    assert python(program) == "True\n"


def test_a_lightning_that_needs_more_of_the_compiler_gets_it() -> None:
    """Stood for by one that is lent less."""
    program = """
from gptexp.training import startup
del startup._LENT["OptimizedModule"]
startup.import_lightning()
import torch._dynamo
from lightning.fabric import wrappers
from lightning.pytorch import Trainer
print(wrappers.OptimizedModule is torch._dynamo.OptimizedModule)
"""
    assert python(program) == "True\n"


def test_the_search_for_garbage_goes_on_after_imports() -> None:
    program = """
import gc
from gptexp.console import importing
with importing():
    assert not gc.isenabled()
    import hydra
assert gc.isenabled() and gc.get_freeze_count()
frozen = gc.get_freeze_count()
with importing():
    import hydra
assert gc.get_freeze_count() == frozen  # a later run's garbage is not kept
gc.disable()
with importing():
    pass
print(gc.isenabled())
"""
    assert python(program) == "False\n"
