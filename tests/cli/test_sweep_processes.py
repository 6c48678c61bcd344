"""Sweeps of real processes: killed, interrupted, two at once, and through every launcher."""

import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from gptexp.analysis.collect import collect
from gptexp.analysis.study import build_study
from gptexp.analysis.tables import comparisons_table, runs_table, variants_table
from tests.cli.test_interruption import kill, wait_until
from tests.conftest import TINY, finish, runs_of, spawn, timeless


def begin(corpus: Path, folder: Path, *overrides: str):  # type: ignore[no-untyped-def]
    return spawn("-m", *TINY, f"data.path={corpus}", f"output_dir={folder}", "sweep.name=mine", *overrides, cwd=folder)


TWELVE = ["norm=layernorm,rmsnorm,batchnorm", "placement=pre,post", "seed=1,2"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_five_times_and_the_same_in_the_end(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    code, out, err = finish(begin(corpus, tmp_path / "whole", *TWELVE))
    assert code == 0, err
    draw = random.Random(0)
    folder = tmp_path / "killed" / "sweeps" / "mine"
    for number in range(5):
        process = begin(corpus, tmp_path / "killed", *TWELVE)
        wanted = draw.uniform(2 * number, 2 * number + 2)  # somewhere in the jobs that are left
        wait_until(lambda n=wanted: progress(folder) >= n, process)
        kill(process)
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
    both = [begin(corpus, tmp_path, *TWELVE, "max_steps=120") for _ in range(2)]
    results = [finish(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0], results
    runs = runs_of(tmp_path / "sweeps" / "mine")
    assert len(runs) == 12
    starts = {name: run.log_path.read_text().count("started: ") for name, run in runs.items()}
    assert set(starts.values()) == {1}  # each job began once
    workers = {run.log_path.read_text().split()[2] for run in runs.values()}
    assert len(workers) == 2  # and both processes had some
    assert table(results[0][1]) == table(results[1][1])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_interrupted_it_saves_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "mine"
    process = begin(corpus, tmp_path, "seed=1,2", "max_steps=2000", "eval_interval=500")
    wait_until(lambda: progress(folder) >= 1, process)
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
@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_every_launcher_comes_to_the_same_result(launcher: str, corpus: Path, tmp_path: Path) -> None:
    plugin = {"joblib": "joblib", "submitit_local": "submitit", "ray": "ray"}[launcher]
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    for folder, how in (("serial", []), ("parallel", [f"hydra/launcher={launcher}"])):
        (tmp_path / folder).mkdir()
        code, out, err = finish(begin(corpus, tmp_path / folder, "norm=layernorm,rmsnorm", "seed=1,2",
                                       "hardware.threads=1", *how))  # fmt: skip
        assert code == 0, out + err
        assert "step 24/24" not in out  # the table of jobs is shown in place of each one's progress
        for run in runs_of(tmp_path / folder / "sweeps" / "mine").values():  # the command as it was typed
            assert run.info["command"][1:] == ["-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path / folder}",
                                               "sweep.name=mine", "norm=layernorm,rmsnorm", "seed=1,2",
                                               "hardware.threads=1", *how]  # fmt: skip
    serial, parallel = (runs_of(tmp_path / f / "sweeps" / "mine") for f in ("serial", "parallel"))
    assert list(serial) == list(parallel)
    assert len(serial) == 4
    for name, run in serial.items():
        assert timeless(run) == timeless(parallel[name])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_has_started_them(
    number: signal.Signals, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    long = ["seed=1,2", "max_steps=20000", "eval_interval=50", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = begin(corpus, tmp_path, *long)
    folder, deadline = tmp_path / "sweeps" / "mine", time.monotonic() + 180
    wait_until(lambda: len(list(folder.glob("*/metrics.csv"))) >= 2, process)
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
