"""Sweeps that are stopped, continued, shared and repeated, with real runs."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose
from hydra.core.plugins import Plugins

from gptexp.runs.run import Run
from gptexp.sweeps import grid
from gptexp.sweeps.sweep import Sweep
from tests.conftest import TINY, failing, runs_of, timeless

GRID = ["norm=layernorm,rmsnorm", "seed=1,2"]
NAMES = [f"{norm}-pre-h2-s{seed}" for norm in ("layernorm", "rmsnorm") for seed in (1, 2)]
Start = Callable[..., int]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def sweep(command: Callable[..., int], corpus: Path, tmp_path: Path) -> Start:
    """Starts a sweep of the name "mine", with runs of two steps; returns the exit status."""

    def run(*overrides: str) -> int:
        return command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path}", "max_steps=2", "eval_interval=2",
                       "sweep.name=mine", *overrides)  # fmt: skip

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sweeps" / "mine"


def test_the_same_command_trains_nothing_twice(sweep: Start, tmp_path: Path, capfd: Captured) -> None:
    assert sweep("sweep.name=null", *GRID) == 0
    (folder,) = (tmp_path / "sweeps").iterdir()
    assert folder.name.startswith("norm-seed-")
    assert json.loads((folder / "sweep.json").read_bytes())["jobs"] == NAMES
    before = {name: (run.path / "run.json").read_bytes() for name, run in runs_of(folder).items()}
    table = capfd.readouterr().out.partition("--- 4 jobs")[2]
    # Nor does one that differs in what changes no result.
    assert sweep("sweep.name=null", *GRID, "diagnostics_interval=1", "hardware.timeout=60") == 0
    assert {name: (run.path / "run.json").read_bytes() for name, run in runs_of(folder).items()} == before
    out = capfd.readouterr().out
    assert f"{folder}: 4 of 4 jobs are done already" in out
    assert out.partition("--- 4 jobs")[2] == table


def test_more_jobs_join_the_sweep(sweep: Start, folder: Path) -> None:
    assert sweep("norm=layernorm,rmsnorm", "seed=1") == 0
    assert sweep("norm=layernorm,rmsnorm", "seed=2") == 0
    assert sweep("norm=rmsnorm", "seed=3") == 0
    joined = [NAMES[0], NAMES[2], NAMES[1], NAMES[3], "rmsnorm-pre-h2-s3"]
    assert Sweep(folder).info["jobs"] == joined
    assert list(runs_of(folder)) == sorted(joined)


def test_another_configuration_is_refused_with_the_keys(sweep: Start, folder: Path, capfd: Captured) -> None:
    assert sweep("seed=1,2") == 0
    before = (folder / "sweep.json").read_bytes()
    capfd.readouterr()
    assert sweep("seed=1,2", "max_steps=3", "batch_size=8") == 2
    assert capfd.readouterr().err.splitlines() == [
        f"error: sweep.name=mine: {new} differs from the sweep's {old}; leave it out, or give the new sweep another "
        "name" for new, old in (("batch_size=8", "batch_size=4"), ("max_steps=3", "max_steps=2"))
    ]
    assert (folder / "sweep.json").read_bytes() == before
    assert {run.config.max_steps for run in runs_of(folder).values()} == {2}


def test_a_run_of_another_configuration_is_not_taken_for_a_job(sweep: Start, folder: Path, capfd: Captured) -> None:
    """A swept group brings its settings along, so the sweep's own settings do not tell that one of them has changed."""
    assert sweep("optimizer=adamw,sgd") == 0
    capfd.readouterr()
    assert sweep("optimizer=adamw,sgd", "optimizer.learning_rate=0.5") == 2
    assert capfd.readouterr().err.splitlines() == [
        f"error: sweep job {folder}/layernorm-pre-h2-s1337-optimizer_{name}: optimizer.learning_rate=0.5 differs from "
        f"the run's optimizer.learning_rate={rate}; give the new sweep another sweep.name"
        for name, rate in (("adamw", "0.001"), ("sgd", "0.1"))
    ]


@pytest.mark.slow
def test_a_failed_job_runs_again_as_often_as_it_may(sweep: Start, folder: Path, capfd: Captured) -> None:
    same = ["seed=1,2", "sweep.retries=1"]
    with failing() as tried:
        assert [sweep(*same) for _ in range(3)] == [1, 1, 1]
    assert len(tried) == 4  # two jobs, twice; the third command tries none
    run = Run(folder / NAMES[0])
    assert run.info["attempts"] == 2
    assert sweep(*same) == 1
    assert "not tried again (sweep.retries)" in capfd.readouterr().out
    assert sweep("seed=1,2", "sweep.retries=2") == 0
    assert run.info["status"] == "done"


def test_a_job_that_diverges_is_at_its_end(sweep: Start, folder: Path, capfd: Captured) -> None:
    steep = ["optimizer=sgd", "optimizer.learning_rate=0.1,1e30", "norm=none", "grad_clip=0", "max_steps=8"]
    for _ in range(2):
        assert sweep(*steep) == 0
        assert "none-pre-h2-s1337-learning_rate_1e+30 (diverged)" in capfd.readouterr().out
    assert sorted(run.info["status"] for run in runs_of(folder).values()) == ["diverged", "done"]
    assert [run.log_path.read_text().count("started: ") for run in runs_of(folder).values()] == [1, 1]


def test_a_name_must_be_one_of_a_directory(sweep: Start, capfd: Captured) -> None:
    assert sweep("sweep.name=a/b", "seed=1,2") == 2
    assert capfd.readouterr().err.startswith("error: sweep.name=a/b: names a directory")


def test_what_stands_in_the_place_of_a_job(sweep: Start, folder: Path, capfd: Captured) -> None:
    """What a killed process left unfinished is made anew; what is no run is left alone."""
    (folder / NAMES[0] / "checkpoints").mkdir(parents=True)
    (folder / NAMES[0] / "config.yaml").write_text("half")
    (folder / NAMES[1]).mkdir()
    (folder / NAMES[1] / "thesis.txt").write_text("precious")
    assert sweep("seed=1,2") == 1
    assert Run.open(folder / NAMES[0]).info["status"] == "done"
    assert "is in the way of a job" in capfd.readouterr().out
    assert [p.name for p in (folder / NAMES[1]).iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("name", "count"),
    [("norms", 30), *(pytest.param(*rest, marks=pytest.mark.slow)
                      for rest in (("heads", 20), ("learning_rate", 50), ("depth", 20), ("full", 90)))],
)  # fmt: skip
def test_a_named_sweep_has_its_jobs(
    name: str, count: int, command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[grid.Job] = []
    Plugins.instance()  # looks for plugins once a process, and executes their modules anew
    monkeypatch.setattr(grid.Grid, "send", lambda self, todo: jobs.extend(todo) or [])
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
    prepare = grid.Grid.prepare

    def compare(self: grid.Grid, overrides: list[str], varied: list[str]) -> grid.Job:
        sweepers.append(self)
        jobs.append(self.composer.compose(overrides))
        own.append(compose("config", overrides))
        return prepare(self, overrides, varied)

    monkeypatch.setattr(grid.Grid, "prepare", compare)
    monkeypatch.setattr(grid.Grid, "send", lambda *_: [])
    command("-m", f"output_dir={tmp_path}", *swept.split(" "))
    assert len(jobs) > times
    assert jobs == own
    assert len(sweepers[0].composer.composed) == times


@pytest.mark.slow
def test_a_name_of_ones_own_has_the_seed_added(sweep: Start, folder: Path) -> None:
    for seed in (1, 2):
        assert sweep("name=foo", "norm=layernorm,rmsnorm", f"seed={seed}") == 0
    assert {(name, run.config.seed) for name, run in runs_of(folder).items()} == {
        (f"foo-norm_{norm}-s{seed}", seed) for norm in ("layernorm", "rmsnorm") for seed in (1, 2)}  # fmt: skip


def test_one_job_for_each_value(sweep: Start, folder: Path, corpus: Path, tmp_path: Path) -> None:
    """A value that is given twice is one job; two values that make the same name are two."""
    for name in ("a b.txt", "a_b.txt"):
        (tmp_path / name).write_text(corpus.read_text() + name)
    texts = ",".join(f"'{tmp_path}/{name}'" for name in ("a b.txt", "a_b.txt"))
    for _ in range(2):
        assert sweep(f"data.path={texts}", "optimizer.learning_rate=0.1,1e-1") == 0
    runs = runs_of(folder)
    assert sorted(Path(run.config.data.path).name for run in runs.values()) == ["a b.txt", "a_b.txt"]
    assert sorted(Sweep(folder).info["jobs"]) == sorted(runs)


def test_a_directory_that_is_deleted_meanwhile_is_a_failure(
    sweep: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    whole = grid.report

    def deleted(one, jobs):  # type: ignore[no-untyped-def]
        shutil.rmtree(one.folder / NAMES[0])
        return whole(one, jobs)

    with monkeypatch.context() as patch:
        Plugins.instance()
        patch.setattr(grid, "report", deleted)
        assert sweep("seed=1,2") == 1
    assert capfd.readouterr().err == "error: 1 of 2 jobs failed\n"
    assert sweep("seed=1,2") == 0
    assert len(runs_of(folder)) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {'])
def test_a_broken_list_of_jobs_is_told(content: str, sweep: Start, folder: Path, capfd: Captured) -> None:
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(content)
    assert sweep("seed=1,2") == 2
    told = f"error: {folder / 'sweep.json'}: is not whole; remove it, and the same command writes it anew\n"
    assert capfd.readouterr().err == told


def test_broken_runs_are_told(sweep: Start, folder: Path, capfd: Captured) -> None:
    assert sweep("seed=1,2") == 0
    for name, content in zip(NAMES, ("{}", "{"), strict=False):
        (folder / name / "run.json").write_text(content)
    capfd.readouterr()
    assert sweep("seed=1,2") == 2
    first, second = capfd.readouterr().err.splitlines()
    assert first.endswith("run.json does not belong to config.yaml")
    assert second.endswith("run.json is not valid JSON")


@pytest.mark.parametrize("torn", [b"", b'{"best_val_loss": 3.', b"\xff\x00", b"[]"])
def test_a_torn_result_is_a_failure_that_names_the_file(torn: bytes, write: Callable[..., Run]) -> None:
    run = write(2.0)
    one = Sweep(run.path.parent)
    assert one.standing(run.path.name).state == "done"
    (run.path / "result.json").write_bytes(torn)
    standing = one.standing(run.path.name)
    assert (standing.state, standing.error) == ("failed", f"{run.path / 'result.json'} is not whole")
    assert not one.is_final(run.path.name)


def test_the_same_command_writes_a_torn_result_anew(sweep: Start, folder: Path, capfd: Captured) -> None:
    assert sweep("seed=1,2") == 0
    table = capfd.readouterr().out.partition("--- ")[2]
    runs = list(runs_of(folder).values())
    before = [(timeless(run), run.result) for run in runs]
    (runs[0].path / "result.json").write_bytes(b'{"best')
    assert sweep("seed=1,2") == 0
    assert capfd.readouterr().out.partition("--- ")[2] == table
    assert [(timeless(run), run.result) for run in runs] == before


def test_a_full_disk_at_the_end_costs_the_picture_alone(
    sweep: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    from gptexp.analysis import figures

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(figures, "plot_runs", full)
        assert sweep("seed=1,2") == 0
    path = folder / "curves.png"
    assert f"no picture: cannot write {path} (No space left on device)" in capfd.readouterr().out
