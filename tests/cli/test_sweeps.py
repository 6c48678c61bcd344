"""Sweeps that are stopped, continued, shared and repeated, with real runs."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose
from hydra.core.plugins import Plugins

from gptexp.runs import Run
from gptexp.sweeps import Sweep
from hydra_plugins.hydra_gptexp import grid
from tests.conftest import TINY, failing, runs_of

GRID = ["norm=layernorm,rmsnorm", "seed=1,2"]
NAMES = [f"{norm}-pre-h2-s{seed}" for norm in ("layernorm", "rmsnorm") for seed in (1, 2)]
SHORT = ["max_steps=2", "eval_interval=2"]


@pytest.fixture
def sweep(command: Callable[..., int], corpus: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*overrides: str) -> int:
        return command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path}", *overrides)

    return run


@pytest.mark.slow
def test_the_same_command_trains_nothing_twice(
    sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep(*GRID) == 0
    (folder,) = (tmp_path / "sweeps").iterdir()
    assert folder.name.startswith("norm-seed-")
    assert json.loads((folder / "sweep.json").read_bytes())["jobs"] == NAMES
    before = {name: (run.path / "run.json").read_bytes() for name, run in runs_of(folder).items()}
    table = capfd.readouterr().out.partition("--- 4 jobs")[2]
    assert sweep(*GRID) == 0
    assert {name: (run.path / "run.json").read_bytes() for name, run in runs_of(folder).items()} == before
    out = capfd.readouterr().out
    assert f"{folder}: 4 of 4 jobs are done already" in out
    assert out.partition("--- 4 jobs")[2] == table


@pytest.mark.slow
def test_more_seeds_join_the_sweep(sweep: Callable[..., int], tmp_path: Path) -> None:
    assert sweep("sweep.name=mine", "norm=layernorm,rmsnorm", "seed=1,2", "max_steps=2") == 0
    assert sweep("sweep.name=mine", "norm=rmsnorm", "seed=3", "max_steps=2") == 0
    assert Sweep(tmp_path / "sweeps" / "mine").info["jobs"] == [*NAMES, "rmsnorm-pre-h2-s3"]
    assert list(runs_of(tmp_path / "sweeps" / "mine")) == sorted([*NAMES, "rmsnorm-pre-h2-s3"])
    assert sweep("sweep.name=one", "norm=layernorm,rmsnorm", "seed=1", "max_steps=2") == 0
    assert sweep("sweep.name=one", "norm=layernorm,rmsnorm", "seed=2", "max_steps=2") == 0
    assert list(runs_of(tmp_path / "sweeps" / "one")) == NAMES


def test_another_configuration_is_refused_with_the_keys(
    sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep("sweep.name=mine", "seed=1,2", "max_steps=2") == 0
    before = (tmp_path / "sweeps" / "mine" / "sweep.json").read_bytes()
    capfd.readouterr()
    assert sweep("sweep.name=mine", "seed=1,2", "max_steps=3", "batch_size=8") == 2
    assert capfd.readouterr().err.splitlines() == [
        "error: sweep.name=mine: batch_size=8 differs from the sweep's batch_size=4; leave it out, or give the new "
        "sweep another name",
        "error: sweep.name=mine: max_steps=3 differs from the sweep's max_steps=2; leave it out, or give the new "
        "sweep another name",
    ]
    assert (tmp_path / "sweeps" / "mine" / "sweep.json").read_bytes() == before
    assert {run.config.max_steps for run in runs_of(tmp_path / "sweeps" / "mine").values()} == {2}


@pytest.mark.slow
def test_a_failed_job_runs_again_as_often_as_it_may(
    sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    same = ["sweep.name=mine", "seed=1,2", "sweep.retries=1"]
    with failing() as tried:
        assert [sweep(*same) for _ in range(3)] == [1, 1, 1]
    assert len(tried) == 4  # two jobs, twice; the third command tries none
    run = Run(tmp_path / "sweeps" / "mine" / "layernorm-pre-h2-s1")
    assert run.info["attempts"] == 2
    assert sweep(*same) == 1
    assert "not tried again (sweep.retries)" in capfd.readouterr().out
    assert sweep("sweep.name=mine", "seed=1,2", "sweep.retries=2") == 0
    assert run.info["status"] == "done"


def test_a_name_must_be_one_of_a_directory(sweep: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep("sweep.name=a/b", "seed=1,2") == 2
    assert capfd.readouterr().err.startswith("error: sweep.name=a/b: names a directory")


def test_a_directory_that_a_killed_process_left_unfinished_is_made_anew(
    sweep: Callable[..., int], tmp_path: Path
) -> None:
    path = tmp_path / "sweeps" / "mine" / "layernorm-pre-h2-s1"
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text("half")
    assert sweep("sweep.name=mine", "seed=1,2", "max_steps=2") == 0
    assert Run.open(path).info["status"] == "done"


def test_what_is_no_run_is_left_alone(
    sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweeps" / "mine" / "layernorm-pre-h2-s1"
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("precious")
    assert sweep("sweep.name=mine", "seed=1,2", "max_steps=2") == 1
    assert "is in the way of a job" in capfd.readouterr().out
    assert os.listdir(path) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("name", "count"),
    [("norms", 30), *(pytest.param(*rest, marks=pytest.mark.slow)
                      for rest in (("heads", 20), ("learning_rate", 30), ("depth", 20), ("full", 90)))],
)  # fmt: skip
def test_a_named_sweep_has_its_jobs(
    name: str, count: int, command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[grid.Job] = []
    Plugins.instance()  # looks for plugins once a process, and executes their modules anew
    monkeypatch.setattr(grid.GridSweeper, "send", lambda self, todo: jobs.extend(todo) or [])
    assert command("-m", f"sweep={name}", f"output_dir={tmp_path}") == 1  # for no job has run
    assert len({job.name for job in jobs}) == count
    assert Sweep(tmp_path / "sweeps" / name).info["jobs"] == [job.name for job in jobs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("swept", "times"),
    [
        ("optimizer.learning_rate=0.1,0.2 data.path=a.txt,'b,c.txt' ++max_steps=3,4 seed=1,2", 2),
        ("optimizer=adamw,sgd norm=layernorm,rmsnorm model.norms.rmsnorm.eps=1e-5,1e-6 name=null,x", 4),
        ("seed=range(1,9) model.norms.rmsnorm={eps:0.5} max_steps=3", 1),
    ],
)
def test_jobs_that_differ_in_values_alone_are_composed_once(
    swept: str, times: int, command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each has the settings that Hydra gives it by itself."""
    jobs, own, sweepers = [], [], []
    Plugins.instance()
    prepare = grid.GridSweeper.prepare

    def compare(self: grid.GridSweeper, overrides: list[str], varied: list[str]) -> grid.Job:
        sweepers.append(self)
        jobs.append(self.composer.compose(overrides))
        own.append(compose("config", overrides))
        return prepare(self, overrides, varied)

    monkeypatch.setattr(grid.GridSweeper, "prepare", compare)
    monkeypatch.setattr(grid.GridSweeper, "send", lambda *_: [])
    command("-m", f"output_dir={tmp_path}", *swept.split(" "))
    assert len(jobs) > times
    assert jobs == own
    assert len(sweepers[0].composer.composed) == times


def test_a_run_of_another_configuration_is_not_taken_for_a_job(
    sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A swept group brings its settings along, so the sweep's own settings do not tell that one of them has changed."""
    assert sweep("sweep.name=mine", "optimizer=adamw,sgd", *SHORT) == 0
    capfd.readouterr()
    assert sweep("sweep.name=mine", "optimizer=adamw,sgd", "optimizer.learning_rate=0.5", *SHORT) == 2
    folder = tmp_path / "sweeps" / "mine"
    assert capfd.readouterr().err.splitlines() == [
        f"error: sweep job {folder}/layernorm-pre-h2-s1337-optimizer_{name}: optimizer.learning_rate=0.5 differs from "
        f"the run's optimizer.learning_rate={rate}; give the new sweep another sweep.name"
        for name, rate in (("adamw", "0.001"), ("sgd", "0.1"))
    ]


@pytest.mark.slow
def test_a_name_of_ones_own_has_the_seed_added(sweep: Callable[..., int], tmp_path: Path) -> None:
    for seed in (1, 2):
        assert sweep("sweep.name=mine", "name=foo", "norm=layernorm,rmsnorm", f"seed={seed}", *SHORT) == 0
    runs = runs_of(tmp_path / "sweeps" / "mine")
    assert {(name, run.config.seed) for name, run in runs.items()} == {
        (f"foo-norm_{norm}-s{seed}", seed) for norm in ("layernorm", "rmsnorm") for seed in (1, 2)}  # fmt: skip


def test_values_that_make_one_name_make_two_jobs(sweep: Callable[..., int], tmp_path: Path, corpus: Path) -> None:
    for name in ("a b.txt", "a_b.txt"):
        (tmp_path / name).write_text(corpus.read_text() + name)
    texts = ",".join(f"'{tmp_path}/{name}'" for name in ("a b.txt", "a_b.txt"))
    for _ in range(2):
        assert sweep("sweep.name=mine", f"data.path={texts}", *SHORT) == 0
    runs = runs_of(tmp_path / "sweeps" / "mine")
    assert {Path(run.config.data.path).name for run in runs.values()} == {"a b.txt", "a_b.txt"}
    assert sorted(Sweep(tmp_path / "sweeps" / "mine").info["jobs"]) == sorted(runs)


def test_a_value_given_twice_is_one_job(
    sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep("sweep.name=mine", "optimizer.learning_rate=0.1,1e-1", "seed=1,1,2", *SHORT) == 0
    assert len(runs_of(tmp_path / "sweeps" / "mine")) == 2
    assert "--- 2 jobs" in capfd.readouterr().out


def test_a_directory_that_is_deleted_meanwhile_is_a_failure(
    sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = grid.report

    def deleted(one, jobs):  # type: ignore[no-untyped-def]
        shutil.rmtree(one.folder / NAMES[0])
        return whole(one, jobs)

    with monkeypatch.context() as patch:
        Plugins.instance()
        patch.setattr(grid, "report", deleted)
        assert sweep("sweep.name=mine", "seed=1,2", *SHORT) == 1
    assert capfd.readouterr().err == "error: 1 of 2 jobs failed\n"
    assert sweep("sweep.name=mine", "seed=1,2", *SHORT) == 0
    assert len(runs_of(tmp_path / "sweeps" / "mine")) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {'])
def test_a_broken_list_of_jobs_is_told(
    content: str, sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweeps" / "mine" / "sweep.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert sweep("sweep.name=mine", "seed=1,2", *SHORT) == 2
    assert capfd.readouterr().err == (
        f"error: {path}: is not whole; remove it, and the same command writes it anew\n")  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("run.json", "{}", "run.json does not belong to config.yaml"),
        ("run.json", "{", "run.json is not valid JSON"),
    ],
)
def test_a_broken_run_is_told(
    file: str, content: str, told: str, sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep("sweep.name=mine", "seed=1,2", *SHORT) == 0
    (tmp_path / "sweeps" / "mine" / NAMES[0] / file).write_text(content)
    capfd.readouterr()
    assert sweep("sweep.name=mine", "seed=1,2", *SHORT) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(told)


def test_a_full_disk_at_the_end_costs_the_picture_alone(
    sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from gptexp.analysis import plots

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "plot_runs", full)
        assert sweep("sweep.name=mine", "seed=1,2", *SHORT) == 0
    path = tmp_path / "sweeps" / "mine" / "curves.png"
    assert f"no picture: cannot write {path} (No space left on device)" in capfd.readouterr().out
