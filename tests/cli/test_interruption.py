"""Runs that are killed, interrupted or out of disk space, in real processes, and what resuming makes of them."""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptexp.runs.run import Run
from tests.conftest import TINY, finish, more, spawn, timeless

SLOWER = ["max_steps=400", "eval_interval=40", "checkpoint_interval=30", "log_interval=10", "model.dropout=0.1"]
ROWS = 41  # that such a run has, with the one before its first step


def begin(corpus: Path, folder: Path, *overrides: str, **options: object):  # type: ignore[no-untyped-def]
    settings = [*TINY, *SLOWER, f"data.path={corpus}", f"hydra.run.dir={folder}", *overrides]
    return spawn(*settings, cwd=folder.parent, **options)


def wait_until(done: Callable[[], bool], process) -> None:  # type: ignore[no-untyped-def]
    """Wait while a process runs, for two minutes at most."""
    deadline = time.monotonic() + 120
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for_rows(folder: Path, count: int, process) -> None:  # type: ignore[no-untyped-def]
    wait_until(lambda: rows(folder) >= count, process)


def kill(process) -> None:  # type: ignore[no-untyped-def]
    process.send_signal(signal.SIGKILL)
    process.communicate()


def rows(folder: Path) -> int:
    path = folder / "metrics.csv"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


def begin_and_halt(corpus: Path, folder: Path, count: int, last: int, *overrides: str):  # type: ignore[no-untyped-def]
    """A run that SIGSTOP holds somewhere after `count` rows and before its `last`; SIGCONT lets it go on.

    On a busy machine a run may be over before this process gets to look at it. Then another one is begun.
    """
    for _ in range(10):
        process = begin(corpus, folder, *overrides)
        while process.poll() is None and rows(folder) < count:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if process.poll() is None and rows(folder) < last:
                return process
        process.kill()
        _, err = process.communicate()
        shutil.rmtree(folder, ignore_errors=True)
    raise AssertionError(f"never held between {count} and {last} rows: {err}")


def work_on(process, seconds: float) -> None:  # type: ignore[no-untyped-def]
    """Wait until a process has used so much more processor time, however long a busy machine takes for that."""

    def used() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    wanted = used() + seconds
    wait_until(lambda: used() >= wanted, process)


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    code, _, err = finish(begin(corpus, folder))
    assert code == 0, err
    return Run.open(folder)


def check_same(run: Run, unbroken: Run) -> None:
    assert timeless(run) == timeless(unbroken)
    assert run.samples_path.read_bytes() == unbroken.samples_path.read_bytes()
    assert run.info["status"] == "done"
    keep = ("best_val_loss", "best_step", "final", "tokens", "step")
    assert run.result is not None
    assert unbroken.result is not None
    assert {k: run.result[k] for k in keep} == {k: unbroken.result[k] for k in keep}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *map(more, range(1, 10))])
def test_killed_and_resumed_is_as_unbroken(
    seed: int, corpus: Path, tmp_path: Path, unbroken: Run, command: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The first two go on in a process of their own, the others in this one, which has trained other things before."""
    draw, folder = random.Random(seed), tmp_path / "run"
    kill(begin_and_halt(corpus, folder, draw.randint(1, 40), ROWS))
    assert Run.open(folder).info["status"] == "running"
    if seed < 2:
        code, out, err = finish(spawn(f"resume={folder}", cwd=tmp_path))
    else:
        code = command(f"resume={folder}")
        out, err = capfd.readouterr()
    assert code == 0, err
    assert "resuming" in out
    check_same(Run.open(folder), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), more(signal.SIGTERM, 143)])
def test_signals_save_and_resume_auto_goes_on(
    number: int, status: int, corpus: Path, tmp_path: Path, unbroken: Run
) -> None:
    folder = tmp_path / "out" / "runs" / "run"
    folder.parent.mkdir(parents=True)
    process = begin_and_halt(corpus, folder, 8, ROWS - 2, f"output_dir={tmp_path / 'out'}")
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    code, out, err = finish(process)
    assert code == status, out + err
    assert err == ""
    run = Run.open(folder)
    assert run.info["status"] == "interrupted"
    assert f"resume={folder}" in out
    same = [*TINY, *SLOWER, f"data.path={corpus}", f"output_dir={tmp_path / 'out'}"]
    code, out, err = finish(spawn(*same, "resume=auto", cwd=tmp_path))
    assert code == 0, err
    assert f"resuming {folder}" in out
    check_same(run, unbroken)
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_signal_between_micro_batches_is_saved_too(corpus: Path, tmp_path: Path) -> None:
    cut = ["gradient_accumulation_steps=4", "max_steps=100"]
    unbroken, folder = tmp_path / "unbroken", tmp_path / "run"
    assert finish(begin(corpus, unbroken, *cut))[0] == 0
    process = begin_and_halt(corpus, folder, 5, 9, *cut)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert finish(process)[0] == 143
    assert finish(spawn(f"resume={folder}", cwd=tmp_path))[0] == 0
    check_same(Run.open(folder), Run.open(unbroken))


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # A step of many micro-batches lasts long enough for two signals.
    process = begin(corpus, folder, "batch_size=4096", "gradient_accumulation_steps=2048", "max_steps=2")
    wait_for_rows(folder, 1, process)
    work_on(process, 0.5)
    process.send_signal(signal.SIGINT)
    work_on(process, 0.5)  # long enough to have taken note of the first one
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (130, "")
    assert Run.open(folder).info["status"] == "interrupted"


def test_resume_auto_without_a_run_starts_one(command: Callable[..., int], corpus: Path, tmp_path: Path) -> None:
    assert command(*TINY, f"data.path={corpus}", f"output_dir={tmp_path}", "resume=auto") == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert Run.open(path).info["status"] == "done"


@pytest.mark.slow
def test_two_processes_cannot_train_one_run(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = begin(corpus, folder, "max_steps=1000000")
    wait_for_rows(folder, 3, first)
    code, _, err = finish(spawn(f"resume={folder}", cwd=tmp_path))
    kill(first)
    assert code == 2
    assert err == f"error: resume={folder}: another process is training this run\n"


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(corpus: Path, tmp_path: Path, unbroken: Run) -> None:
    """A limit on the size of files stands in for a full disk: metrics.csv fits, a checkpoint does not."""
    folder = tmp_path / "run"
    size = unbroken.checkpoint("last").stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

    code, _, err = finish(begin(corpus, folder, preexec_fn=limit))
    assert code == 1
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    run = Run.open(folder)
    assert run.info["status"] == "failed"
    assert "Traceback" in run.log_path.read_text()
    # The untrained model, which fitted, is whole; of the checkpoint that did not, nothing is left.
    assert sorted(p.name for p in run.checkpoint("last").parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(run.checkpoint("last"), weights_only=True)["global_step"] == 0
    code, _, err = finish(spawn(f"resume={folder}", cwd=tmp_path))  # with room on the disk again
    assert code == 0, err
    check_same(run, unbroken)
