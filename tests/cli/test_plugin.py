"""A norm from outside the package: found by an entry point or an import, it trains, sweeps and is audited."""

import json
import os
from pathlib import Path

import pytest

from gptexp.models.registry import NORMS
from gptexp.runs import Run
from tests.conftest import TINY, finish, more, spawn
from tests.perf.test_mkl_kernels import NEEDED

MODULE = '''
from dataclasses import dataclass

import torch
from torch import nn

from gptexp.models.registry import NORMS, Norm, NormSettings


@dataclass(frozen=True)
class Settings(NormSettings):
    power: float = 1.0

    def problems(self, shape):
        return [f"power={self.power}: must not be 0"] if self.power == 0 else []


class Toy(nn.Module):
    """x over the largest magnitude of any channel at any position so far: it looks back, but not ahead."""

    def __init__(self, settings, shape):
        super().__init__()
        self.power = settings.power
        self.weight = nn.Parameter(torch.ones(shape.channels))

    def forward(self, x, mask=None):
        largest = x.abs().amax(-1, keepdim=True).cummax(1).values
        return x / largest.clamp(min=1e-6) ** self.power * self.weight


NORM = Norm("toynorm:Toy", Settings)
'''
ENTRY_POINTS = "[gptexp.norms]\ntoy = toynorm:NORM\n"


@pytest.fixture(params=[pytest.param("entry point", marks=pytest.mark.slow), more("import")])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine on which the norm is installed as a package, or lies in the working folder."""
    if request.param == "import":
        (tmp_path / "toynorm.py").write_text(MODULE + 'NORMS["toy"] = NORM\n')
        return os.environ | {"GPTEXP_IMPORT": "toynorm"}
    installed = tmp_path / "site"
    info = installed / "toynorm-1.0.dist-info"
    info.mkdir(parents=True)
    (installed / "toynorm.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toynorm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])}


def test_a_norm_of_another_package(environment: dict[str, str], corpus: Path, tmp_path: Path) -> None:
    assert "toy" not in NORMS  # nothing of it is in this process, or in the package's files
    common = [*TINY, f"data.path={corpus}"]
    code, _, err = finish(spawn(
        "-m", *common, "norm=toy,rmsnorm", "model.norms.toy.power=0.5,1", "max_steps=8",
        f"hydra.sweep.dir={tmp_path / 'sweep'}", cwd=tmp_path, env=environment,
    ))  # fmt: skip
    assert (code, err) == (0, "")
    names = {p.name for p in (tmp_path / "sweep").iterdir() if (p / "run.json").exists()}
    assert names == {f"{n}-pre-h2-s1337-power_{p}" for n in ("toy", "rmsnorm") for p in ("0.5", "1")}
    run = Run(tmp_path / "sweep" / "toy-pre-h2-s1337-power_0.5")
    assert run.info["status"] == "done"
    assert run.info["device"]["fast_mkl"] == NEEDED  # though the norm imports torch before any setting is read
    code, _, err = finish(spawn(
        *common, "norm=toy", "max_steps=8", "hardware.fast_mkl=false", f"hydra.run.dir={tmp_path / 'own'}",
        cwd=tmp_path, env=environment,
    ))  # fmt: skip
    assert (code, err) == (0, "")
    assert Run(tmp_path / "own").info["device"]["fast_mkl"] is False
    other = Run(tmp_path / "sweep" / "rmsnorm-pre-h2-s1337-power_1")
    assert run.info["fingerprints"]["code"] != other.info["fingerprints"]["code"]  # the norm's source is part of it
    code, out, err = finish(spawn(f"run={run.path}", cwd=tmp_path, module="gptexp.audit", env=environment))
    assert (code, err) == (0, "")
    report = json.loads((run.path / "audit.json").read_text())
    train = report["modes"]["train"]
    assert (train["looks_ahead"], train["couples"]) == (False, False)
    code, out, err = finish(spawn(
        f"run={run.path}", "prompt=to be", "max_new_tokens=5", cwd=tmp_path, module="gptexp.sample", env=environment))
    assert (code, err) == (0, "")
    assert out.startswith("to be")
    code, _, err = finish(spawn(*common, "norm=toy", "model.norms.toy.power=0", cwd=tmp_path, env=environment))
    assert (code, err) == (2, "error: model.norms.toy.power=0.0: must not be 0\n")
    code, _, err = finish(spawn(f"run={run.path}", cwd=tmp_path, module="gptexp.sample"))  # elsewhere
    assert code == 2
    assert "toy" in err


@pytest.mark.parametrize("module", ["gptexp.train", "gptexp.sample", "gptexp.audit"])
def test_an_import_that_fails_is_one_line(module: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind\n")
    code, _, err = finish(spawn("run=x", cwd=tmp_path, module=module, env=os.environ | {"GPTEXP_IMPORT": "broken"}))
    assert code == 2
    assert err == "error: GPTEXP_IMPORT=broken: cannot be imported (No module named 'nothing_of_the_kind')\n"
