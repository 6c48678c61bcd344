"""Sweeps that are stopped, continued, shared and repeated, with real runs."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins

from gptexp.analysis.collect import collect
from gptexp.analysis.study import build_study
from gptexp.analysis.tables import comparisons_table, runs_table, variants_table
from gptexp.runs import Run
from gptexp.sweeps import Sweep
from gptexp.training.callbacks.recorder import Recorder
from hydra_plugins.hydra_gptexp import grid
from tests.conftest import TINY, finish, spawn, timeless

GRID = ["norm=layernorm,rmsnorm", "seed=1,2"]
NAMES = [f"{norm}-pre-h2-s{seed}" for norm in ("layernorm", "rmsnorm") for seed in (1, 2)]


@pytest.fixture
def sweep(command: Callable[..., int], corpus: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*overrides: str) -> int:
        return command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path}", *overrides)

    return run


def runs_of(folder: Path) -> dict[str, Run]:
    return {p.name: Run.open(p) for p in sorted(folder.iterdir()) if (p / "run.json").exists()}


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


def test_a_failed_job_runs_again_as_often_as_it_may(
    sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def explode(self, trainer, module, step):  # type: ignore[no-untyped-def]
        tried.append(step)
        raise RuntimeError("in the middle")

    same = ["sweep.name=mine", "seed=1,2", "sweep.retries=1"]
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_train_row", explode)
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


def begin(corpus: Path, folder: Path, *overrides: str):  # type: ignore[no-untyped-def]
    return spawn("-m", *TINY, f"data.path={corpus}", f"output_dir={folder}", "sweep.name=mine", *overrides, cwd=folder)


TWELVE = ["norm=layernorm,rmsnorm,batchnorm", "placement=pre,post", "seed=1,2"]


@pytest.mark.slow
def test_killed_five_times_and_the_same_in_the_end(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    code, out, err = finish(begin(corpus, tmp_path / "whole", *TWELVE))
    assert code == 0, err
    draw = random.Random(0)
    folder = tmp_path / "killed" / "sweeps" / "mine"
    for number in range(5):
        process = begin(corpus, tmp_path / "killed", *TWELVE)
        # somewhere in the jobs that are left
        wanted, deadline = draw.uniform(2 * number, 2 * number + 2), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and progress(folder) < wanted:
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, again, err = finish(begin(corpus, tmp_path / "killed", *TWELVE))
    assert code == 0, err
    whole, killed = runs_of(tmp_path / "whole" / "sweeps" / "mine"), runs_of(folder)
    assert list(whole) == list(killed)
    assert len(whole) == 12
    for name, run in whole.items():
        assert timeless(run) == timeless(killed[name])
    assert table(again) == table(out)
    assert comparison(folder) == comparison(tmp_path / "whole" / "sweeps" / "mine")


def comparison(folder: Path) -> list[str]:
    """The tables of a comparison that hold no times, as the bytes that it would write."""
    study = build_study(collect([folder]))
    return [make(study).to_csv() for make in (variants_table, comparisons_table, runs_table)]


def table(out: str) -> list[str]:
    """The final table of a sweep's output."""
    lines = out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("--- "))
    assert len(lines) > begin + 12
    return lines[begin : begin + 13]


def progress(folder: Path) -> float:
    """Jobs done, and the part of the one under way."""
    rows = [p.read_bytes().count(b"\n") for p in folder.glob("*/metrics.csv")]
    return sum(min(1.0, n / 12) for n in rows)


@pytest.mark.slow
def test_two_at_once_share_the_work(corpus: Path, tmp_path: Path) -> None:
    both = [begin(corpus, tmp_path, *TWELVE, "max_steps=200") for _ in range(2)]
    results = [finish(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0], results
    runs = runs_of(tmp_path / "sweeps" / "mine")
    assert len(runs) == 12
    starts = {name: run.log_path.read_text().count("started: ") for name, run in runs.items()}
    assert set(starts.values()) == {1}  # each job began once
    workers = {run.log_path.read_text().split()[2] for run in runs.values()}
    assert len(workers) == 2  # and both processes had some
    assert table(results[0][1]) == table(results[1][1])


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


@pytest.mark.slow
def test_interrupted_it_saves_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "mine"
    process = begin(corpus, tmp_path, "seed=1,2", "max_steps=2000", "eval_interval=500")
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and progress(folder) < 1:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (130, "")
    assert f"{folder}: stopped; the same command goes on with it" in out
    (run,) = runs_of(folder).values()
    assert run.info["status"] == "interrupted"
    code, out, err = finish(begin(corpus, tmp_path, "seed=1,2", "max_steps=2000", "eval_interval=500"))
    assert code == 0, err
    assert {r.info["status"] for r in runs_of(folder).values()} == {"done"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_every_launcher_comes_to_the_same_result(launcher: str, corpus: Path, tmp_path: Path) -> None:
    plugin = {"joblib": "joblib", "submitit_local": "submitit", "ray": "ray"}[launcher]
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    for folder, how in (("serial", []), ("parallel", [f"hydra/launcher={launcher}"])):
        (tmp_path / folder).mkdir()
        code, out, err = finish(begin(corpus, tmp_path / folder, *GRID, "hardware.threads=1", *how))
        assert code == 0, out + err
    serial, parallel = (runs_of(tmp_path / f / "sweeps" / "mine") for f in ("serial", "parallel"))
    assert list(serial) == list(parallel) == NAMES
    for name, run in serial.items():
        assert timeless(run) == timeless(parallel[name])


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


SHORT = ["max_steps=2", "eval_interval=2"]


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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_has_started_them(
    number: signal.Signals, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    long = ["seed=1,2", "max_steps=20000", "eval_interval=50", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = begin(corpus, tmp_path, *long)
    folder, deadline = tmp_path / "sweeps" / "mine", time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline and len(list(folder.glob("*/metrics.csv"))) < 2:
        time.sleep(0.1)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    while time.monotonic() < deadline and any(map(alive, workers)):
        time.sleep(0.1)
    assert not any(map(alive, workers))


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] if int(fields[1]) == parent else []
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
