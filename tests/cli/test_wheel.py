"""The wheel carries its configuration and works from an empty folder."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY


@pytest.mark.slow
def test_the_wheel_trains_from_an_empty_folder(corpus: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*build, REPOSITORY], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    # The dependencies are this environment's: a path in a .pth file brings them, but not this checkout.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    where = subprocess.run([python, "-c", "import gptexp; print(gptexp.__file__)"], cwd=empty, check=True,
                           capture_output=True, text=True).stdout  # fmt: skip
    assert where.startswith(str(site))
    settings = [*TINY, f"data.path={corpus}", "norm=rmsnorm", "experiment=nanogpt_cpu", "max_steps=4"]
    subprocess.run([tmp_path / "venv" / "bin" / "gptexp-train", *settings], cwd=empty, check=True)
    (run,) = (empty / "outputs" / "runs").iterdir()
    sample = [tmp_path / "venv" / "bin" / "gptexp-sample", f"run={run}", "prompt=To be", "max_new_tokens=5"]
    assert subprocess.run(sample, cwd=empty, check=True, capture_output=True, text=True).stdout.startswith("To be")
