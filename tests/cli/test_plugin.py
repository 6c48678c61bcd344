"""A norm of an installed package is found by its entry point; tests/cli/test_extend.py has each kind, by import."""

import os
from pathlib import Path

import pytest

from gptexp.registry import NORMS
from gptexp.runs.run import Run
from tests.conftest import TINY, finish, spawn
from tests.perf.test_mkl_kernels import NEEDED

MODULE = '''
import torch
from torch import nn

from gptexp.models.norms import NormSettings
from gptexp.registry import NORMS


@NORMS.register("toy", NormSettings)
class Toy(nn.Module):
    """x over its largest magnitude."""

    def __init__(self, settings, shape):
        super().__init__()

    def forward(self, x, mask=None):
        return x / x.abs().amax(-1, keepdim=True).clamp(min=1e-6)
'''


@pytest.mark.slow
def test_a_norm_of_another_package(corpus: Path, tmp_path: Path) -> None:
    assert "toy" not in NORMS
    installed = tmp_path / "site"
    info = installed / "toynorm-1.0.dist-info"
    info.mkdir(parents=True)
    (installed / "toynorm.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toynorm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gptexp.norms]\ntoy = toynorm\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])}
    settings = [*TINY, f"data.path={corpus}", "max_steps=8"]
    sweep = ["-m", *settings, "norm=toy,rmsnorm", f"hydra.sweep.dir={tmp_path}"]
    assert finish(spawn(*sweep, cwd=tmp_path, env=environment))[::2] == (0, "")
    toy, other = Run(tmp_path / "toy-pre-h2-s1337"), Run(tmp_path / "rmsnorm-pre-h2-s1337")
    assert (toy.info["status"], other.info["status"]) == ("done", "done")
    assert toy.info["fingerprints"]["code"] != other.info["fingerprints"]["code"]  # the norm's source is part of it
    # The norm imports torch before any setting is read, and yet this one, which must come first, has its effect.
    assert toy.info["device"]["fast_mkl"] == NEEDED
    slow = [*settings, "norm=toy", "hardware.fast_mkl=false", f"hydra.run.dir={tmp_path / 'slow'}"]
    assert finish(spawn(*slow, cwd=tmp_path, env=environment))[::2] == (0, "")
    assert Run(tmp_path / "slow").info["device"]["fast_mkl"] is False
    # Where the package is not installed, the run names what is missing.
    code, _, err = finish(spawn(str(toy.path), cwd=tmp_path, module="gptexp.sample"))
    assert code == 2
    assert "model.norm=toy: must be one of " in err
