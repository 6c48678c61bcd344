"""What a Hydra user knows works here: callbacks, resolvers, folders, another primary configuration, its own sweeper."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from gptexp.config.composition import quoted
from gptexp.runs.run import Run
from tests.conftest import TINY, failing, runs_of

SHORT = ["max_steps=2", "eval_interval=2"]
CALLBACK = f"+hydra.callbacks.noting._target_={__name__}.Noting"

noted: list[str] = []


class Noting(Callback):
    """Notes what Hydra tells a callback."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        noted.append(f"start {config.model.norm} {os.environ.get('OF_THE_JOB')}")

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        noted.append(f"end {config.model.norm} {job_return.status.name}")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        noted.append("multirun end")


@pytest.fixture
def run(command: Callable[..., int], corpus: Path, tmp_path: Path) -> Callable[..., int]:
    """A tiny run or, with -m, a sweep."""

    def run(*arguments: str) -> int:
        flags = [a for a in arguments if a.startswith("-")]
        noted.clear()
        settings = [*TINY, *SHORT, f"data.path={corpus}", f"output_dir={tmp_path}"]
        return command(*flags, *settings, *(a for a in arguments if a not in flags))

    return run


def test_callbacks_and_the_environment_of_a_job(run: Callable[..., int]) -> None:
    assert run(CALLBACK, "+hydra.job.env_set.OF_THE_JOB=7") == 0
    assert noted == ["start layernorm 7", "end layernorm COMPLETED"]
    assert "OF_THE_JOB" not in os.environ
    assert run("-m", CALLBACK, "norm=rmsnorm,none") == 0
    assert noted == ["start rmsnorm None", "end rmsnorm COMPLETED", "start none None", "end none COMPLETED",
                     "multirun end"]  # fmt: skip


def test_resolvers_and_the_command_as_it_was_typed(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("name=${hydra:job.name}_${now:%Y}") == 0
    (path,) = (tmp_path / "runs").iterdir()
    alone = Run.open(path)
    assert str(alone.config.name).startswith("train_2")
    assert alone.info["command"] == sys.argv
    assert run("-m", "sweep.name=mine", "name=${hydra:job.name}", "seed=1,2") == 0
    runs = runs_of(tmp_path / "sweeps" / "mine")
    assert list(runs) == ["train-s1", "train-s2"]
    assert [run.info["command"] for run in runs.values()] == [sys.argv, sys.argv]
    assert json.loads((tmp_path / "sweeps" / "mine" / "sweep.json").read_text())["command"] == sys.argv


@pytest.mark.slow
def test_a_folder_with_any_name(run: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s, a = "folder"'
    for _ in range(2):
        assert run("-m", f"hydra.sweep.dir={quoted(str(folder))}", "seed=1,2") == 0
    assert [run.info["status"] for run in runs_of(folder).values()] == ["done", "done"]
    assert run("-m", f"hydra.sweep.dir={tmp_path}/${{now:%Y-%m-%d}}/${{hydra.job.name}}", "seed=1,2") == 0
    (path,) = tmp_path.glob("20*/train")
    assert len(runs_of(path)) == 2


def test_another_primary_configuration(
    command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "short.yaml").write_text("defaults:\n  - config\n  - _self_\nmax_steps: 1\n")
    for flags in (["-cd", str(folder), "-cn", "short"], ["--config-dir", str(folder), "--config-name", "short"]):
        assert command(*flags, "norm=rmsnrom", "~heads", "optimiser=muon", "+placement=pre") == 2
        assert [line.partition(";")[0] for line in capfd.readouterr().err.splitlines()] == [
            "error: norm=rmsnrom: unknown", "error: ~heads: cannot be left out",
            "error: +placement=pre: this group has a choice already", "error: optimiser=muon: unknown key"]  # fmt: skip
    settings = [s for s in TINY if not s.startswith("max_steps")]
    short = ["-cd", str(folder), "-cn", "short"]
    assert command(*short, *settings, f"data.path={corpus}", f"output_dir={tmp_path}", "norm=rmsnorm") == 0
    (path,) = (tmp_path / "runs").iterdir()
    run = Run.open(path)
    assert run.config.model.name == "gpt"
    assert (run.config.max_steps, run.config.model.norm) == (1, "rmsnorm")
    run.update(status="interrupted")
    capfd.readouterr()
    assert command(*short, f"resume={path}", "norm=layernorm") == 2
    assert "model.norm=layernorm differs from the run's model.norm=rmsnorm" in capfd.readouterr().err
    assert command("-cn", "nowhere") == 2
    assert capfd.readouterr().err.startswith("error: Cannot find primary config 'nowhere'")


def test_hydras_own_sweeper(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("-m", "hydra/sweeper=basic", "sweep.name=mine", "norm=layernorm,rmsnorm", "seed=1,2") == 0
    runs = runs_of(tmp_path / "sweeps" / "mine")
    assert {run.config.variant for run in runs.values()} == {
        f"{norm}-pre-h2-s{seed}" for norm in ("layernorm", "rmsnorm") for seed in (1, 2)}  # fmt: skip


@pytest.mark.parametrize("arguments", [["seed=3"], ["-m", "seed=1,2"], ["seed=-1"], ["-m", "model.n_embd=15,16"]])
def test_a_command_leaves_the_process_as_it_was(
    arguments: list[str], run: Callable[..., int], corpus: Path, tmp_path: Path
) -> None:
    """Neither the command line nor the environment carries anything from one part of the program to another."""
    before = dict(os.environ)
    run(*arguments)
    flags, settings = [a for a in arguments if a.startswith("-")], [a for a in arguments if not a.startswith("-")]
    assert sys.argv[1:] == [*flags, *TINY, *SHORT, f"data.path={corpus}", f"output_dir={tmp_path}", *settings]
    new = {name for name, value in os.environ.items() if before.get(name) != value}
    assert not [name for name in new if name.startswith(("GPTEXP", "HYDRA"))]


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_a_failure_is_one_line_and_no_traceback(
    flags: list[str], run: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    with failing():
        assert run(*flags, CALLBACK) == 1
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: RuntimeError: in the middle; traceback in ")
    assert "Traceback" not in out
    if flags:
        assert noted == ["start layernorm None", "end layernorm FAILED"]
