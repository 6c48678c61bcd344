"""Every command of the README, as printed, in a folder of its own; training is cut short by further settings."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SHORT = (
    "max_steps=4 eval_interval=2 eval_windows=2 sample_tokens=5 schedule.warmup_steps=1 "
    "model.n_layer=1 model.n_embd=96"
)
COMMANDS = re.findall(r"^\$ (.+)$", (REPOSITORY / "README.md").read_text(), flags=re.MULTILINE)
MAKE = [c for c in COMMANDS if c.startswith("make ")]
OTHERS = [c for c in COMMANDS if c not in MAKE]


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-c", command], cwd=folder, env=os.environ | {"PATH": path} | environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_the_readme_has_commands_and_its_links_exist() -> None:
    assert MAKE == ["make train", "make test"]
    assert len(OTHERS) > 15
    for target in re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / "README.md").read_text()):
        assert (REPOSITORY / target).exists(), target


@pytest.mark.slow
def test_every_command(tmp_path: Path, corpus: Path) -> None:
    shutil.copy(corpus, tmp_path / "mytext.txt")
    failures = []
    for command in OTHERS:
        trains = "gptexp.train" in command and "--cfg" not in command
        # pydocs needs no network; a corpus named in the command stays.
        short = [SHORT, "data.offline_fallback=pydocs"] if trains and "n_heads" not in command else []
        done = shell(" ".join([command, *short]), tmp_path)
        expected = 2 if "n_heads" in command else 0
        if done.returncode != expected:
            failures.append(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
    assert not failures, "\n".join(failures)


def test_the_printed_mistakes_are_the_real_ones(tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text()
    command, printed = re.findall(r"^\$ (.+)\n((?:error: .+\n)+)", text, flags=re.MULTILINE)[0]
    done = shell(command, tmp_path)
    assert done.returncode == 2
    assert done.stderr == printed


@pytest.mark.slow
def test_make_train_in_a_fresh_clone(tmp_path: Path) -> None:
    """The README's first command where nothing is: no environment, no corpus, no cache."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
    hidden = {"GPTEXP_DATA": "", "GPTEXP_CACHE": str(tmp_path / "cache"), "VIRTUAL_ENV": ""}
    done = shell(f"make train ARGS='{SHORT}'", clone, **hidden)
    assert done.returncode == 0, done.stderr
    (run,) = (clone / "outputs" / "runs").iterdir()
    assert f"results: outputs/runs/{run.name}" in done.stdout
    assert (run / "curves.png").exists()
    again = shell("make --question train", clone, **hidden)
    assert again.returncode == 1  # trains again, always
    assert shell("make --dry-run train | grep -c 'pip install'", clone, **hidden).stdout == "0\n"
