"""Every command of the README, as printed, in a folder of its own; training is cut short by further settings."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
TRAINING = "max_steps=4 eval_interval=2 eval_windows=2 sample_tokens=5 schedule.warmup_steps=1"
SMALL = "model.n_layer=1 model.n_embd=96"


def commands(text: str) -> list[str]:
    return re.findall(r"^\$ (.+)$", text, flags=re.MULTILINE)


SECTIONS = {s.partition("\n")[0]: commands(s) for s in README.split("\n## ") if commands(s)}
MAKE = SECTIONS.pop("# gptexp")


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-c", command], cwd=folder, env=os.environ | {"PATH": path} | environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_the_readme_has_commands_and_its_links_exist() -> None:
    assert MAKE == ["make train", "make test"]
    assert sum(map(len, SECTIONS.values())) > 20
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_every_command(section: str, tmp_path: Path, corpus: Path) -> None:
    shutil.copy(corpus, tmp_path / "mytext.txt")
    (norm,) = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)
    (tmp_path / "mynorm.py").write_text(norm)
    failures = []
    for command in SECTIONS[section]:
        trains = "gptexp.train" in command and "--cfg" not in command and "n_heads" not in command
        # pydocs needs no network; a corpus named in the command stays.
        short = [TRAINING, "data.offline_fallback=pydocs"] if trains else []
        short += [SMALL] if trains and "ladder" not in command else []  # the ladder's sizes are its own
        done = shell(" ".join([command, *short]), tmp_path)
        expected = 2 if "n_heads" in command else 0
        if done.returncode != expected:
            failures.append(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
    assert not failures, "\n".join(failures)


def test_the_printed_mistakes_are_the_real_ones(tmp_path: Path) -> None:
    command, printed = re.findall(r"^\$ (.+)\n((?:error: .+\n)+)", README, flags=re.MULTILINE)[0]
    done = shell(command, tmp_path)
    assert done.returncode == 2
    assert done.stderr == printed


@pytest.mark.slow
def test_make_train_in_a_fresh_clone(tmp_path: Path) -> None:
    """The README's first command where nothing is: no environment, no corpus, no cache."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
    hidden = {"GPTEXP_DATA": "", "GPTEXP_CACHE": str(tmp_path / "cache"), "VIRTUAL_ENV": ""}
    done = shell(f"make train ARGS='{TRAINING} {SMALL}'", clone, **hidden)
    assert done.returncode == 0, done.stderr
    (run,) = (clone / "outputs" / "runs").iterdir()
    assert f"results: outputs/runs/{run.name}" in done.stdout
    assert (run / "curves.png").exists()
    again = shell("make --question train", clone, **hidden)
    assert again.returncode == 1  # trains again, always
    assert shell("make --dry-run train | grep -c 'pip install'", clone, **hidden).stdout == "0\n"
