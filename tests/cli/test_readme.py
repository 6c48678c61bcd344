"""Every command of the README and of the pages on using the program, as printed, with training cut short."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from gptexp.runs.run import Run
from tests.cli import slurm
from tests.cli.agents import free_port
from tests.conftest import REPOSITORY

USE = ("index", "train", "compare", "audit", "loggers", "hardware", "python")
PAGES = {name: (REPOSITORY / name).read_text() for name in ("README.md", *(f"docs/{page}.md" for page in USE))}
TRAINING = "max_steps=4 eval_interval=2 eval_windows=2 sample_tokens=5 schedule.warmup_steps=1"
SMALL = "model.n_layer=1 model.n_embd=96"
MACHINES = re.compile(r"torchrun|srun|.*submitit")


def commands(page: str) -> list[str]:
    return re.findall(r"^\$ (.+)$", PAGES[page], flags=re.MULTILINE)


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-c", command], cwd=folder, env=os.environ | {"PATH": path} | environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_the_readme_is_short_and_its_links_exist() -> None:
    readme = PAGES["README.md"]
    assert commands("README.md")[:2] == ["make train", "make test"]
    assert len(commands("README.md")) == 2 + 10
    assert len(readme.split()) <= 900
    for target in re.findall(r"""\]\(([^)#]+)\)|(?:src|srcset)="(.+?)\"""", readme):
        assert (REPOSITORY / "".join(target)).exists(), target


def shortened(printed: str) -> str:
    """A command that trains, cut short by further settings, of which the last of each key counts."""
    if "gptexp.train" not in printed or re.search("--cfg|--help|n_heads", printed):
        return printed
    short = [printed, TRAINING, "data.offline_fallback=pydocs"]  # a corpus named in the command stays
    short += [SMALL] if "ladder" not in printed else []
    if "seeds=auto" in printed:
        short += ["sweep.max_seeds=3"]
    elif "sweep=" in printed or "seed=range" in printed:
        short += ["seed=1,2"]
    short += ["model.norm=layernorm,rmsnorm"] if "sweep=norms" in printed else []
    short += ["max_steps=8"] if "resume=outputs" in printed else []
    short += ["hydra.sweeper.n_trials=3"] if "optuna" in printed else []
    line = " ".join(short)
    return line.replace("eval_windows=2 ", "") if "monitor=val/loss" in printed else line  # which windows do not give


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command(
    page: str, tmp_path: Path, corpus: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A plain command of ours is run in this process, which has imported torch; anything else in a shell."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus, tmp_path / "mytext.txt")
    (tmp_path / "notes").mkdir()
    shutil.copy(corpus, tmp_path / "notes" / "a.md")
    problems = ({"prompt": f"{n}: ", "answer": str(n * n)} for n in range(50))
    (tmp_path / "problems.jsonl").write_text("".join(f"{json.dumps(problem)}\n" for problem in problems))
    failures = []
    for line in map(shortened, commands(page)):
        if line.startswith("make ") or MACHINES.match(line):
            continue
        plain = re.fullmatch(r"python -m (gptexp\.\w+) ([^|>]*)", line)
        if plain and "--" not in line:
            code = command(*shlex.split(plain[2]), main=import_module(plain[1]).main)
            out = "".join(capfd.readouterr())
        else:
            done = shell(line, tmp_path)
            code, out = done.returncode, done.stdout + done.stderr
        if code != (2 if "n_heads" in line else 0):
            failures.append(f"{line}: {code}\n{out}")
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in commands("docs/hardware.md") if MACHINES.match(line)])
def test_commands_for_several_machines(line: str, corpus: Path, tmp_path: Path) -> None:
    """One process for each machine, on the loopback address, and a stand-in for Slurm."""
    for name in ("sbatch", "srun", "sacct", "scancel"):
        (tmp_path / name).symlink_to(Path(slurm.__file__))
    path = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    short = f"{TRAINING} {SMALL} data=file data.path={corpus} logger=none batch_size=4 output_dir={tmp_path}"
    line = re.sub(r"(per.node[= ])4", r"\g<1>1", line).replace("HOST:29400", f"127.0.0.1:{free_port()}")
    line = line.replace("torchrun ", "torchrun --local-addr 127.0.0.1 ").replace("sweep=norms", "sweep=norms seed=1")
    line = line.replace("sweep=norms", "norm=layernorm,rmsnorm") + f" {short}"
    both = f"{line} & first=$!; {line} && wait $first" if line.startswith("torchrun") else line
    done = shell(both, tmp_path, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [Run.open(found.parent) for found in tmp_path.rglob("run.json")]
    assert len(runs) == (2 if "submitit" in line else 1)
    assert {(run.info["status"], run.info["device"]["devices"]) for run in runs} == {("done", 2)}


@pytest.mark.slow
def test_the_notebooks_code(corpus: Path, tmp_path: Path) -> None:
    """On a small corpus, for a few steps."""
    code = re.findall(r"```python\n(.+?)```", PAGES["docs/python.md"], flags=re.DOTALL)[0]
    small = code.replace('{"name": "shakespeare"}', f'{{"name": "file", "path": "{corpus}"}}')
    small = small.replace("max_steps=500, val_check_interval=100", "max_steps=4, val_check_interval=2")
    assert small.count(str(corpus)) == small.count("max_steps=4") == 1
    (tmp_path / "notebook.py").write_text(small + "print(same.model.config.norm)\n")
    done = shell("python notebook.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("rmsnorm\n")


@pytest.mark.slow
def test_make_train_in_a_fresh_clone(tmp_path: Path) -> None:
    """The README's first command where nothing is but what it depends on: no corpus, no cache, not this package."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(clone / ".venv")], check=True)
    (site,) = (clone / ".venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    hidden = {"GPTEXP_DATA": "", "GPTEXP_CACHE": str(tmp_path / "cache"), "VENV": ".venv", "MAKEFLAGS": ""}
    done = shell(f"make train ARGS='{TRAINING} {SMALL}'", clone, **hidden)
    assert done.returncode == 0, done.stderr
    (run,) = (clone / "outputs" / "runs").iterdir()
    assert f"results: outputs/runs/{run.name}" in done.stdout
    assert (run / "curves.png").exists()
    found = shell(f"{clone}/.venv/bin/python -c 'import gptexp; print(gptexp.__file__)'", tmp_path, PYTHONPATH="")
    assert found.stdout == f"{clone}/gptexp/__init__.py\n"
    again = shell("make --question train", clone, **hidden)
    assert again.returncode == 1  # trains again, always
    assert shell("make --dry-run train | grep -c 'pip install'", clone, **hidden).stdout == "0\n"
