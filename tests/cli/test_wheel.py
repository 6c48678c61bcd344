"""What is published: an sdist that has all that its tests need, and a wheel that works from an empty folder."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(autouse=True)
def _without_this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.mark.slow
def test_the_tests_of_the_sdist_can_be_collected(sdist: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only"], cwd=sdist, check=False)
    assert done.returncode == 0


@pytest.mark.slow
def test_the_wheel_trains_from_an_empty_folder(sdist: Path, corpus: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*build, sdist], check=True)
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
