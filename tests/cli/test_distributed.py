"""Two gloo processes on this machine: one directory a run, and the single process's numbers."""

import signal
from pathlib import Path

import pytest

from gptexp.runs.files import read_metrics
from gptexp.runs.run import Run
from tests.conftest import TINY, finish, runs_of, spawn

LONGER = ["max_steps=60", "eval_interval=20", "log_interval=5"]


def check_close(one: Run, two: Run) -> None:
    a, b = read_metrics(one.metrics_path), read_metrics(two.metrics_path)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for x, y in zip(a, b, strict=True):
        for column in ("train/loss", "val/loss", "tokens"):
            assert x.get(column, 0) == pytest.approx(y.get(column, 0), abs=1e-4), (x["step"], column)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_two_ranks_follow_one_process(norm: str, corpus: Path, tmp_path: Path) -> None:
    common = [*TINY, *LONGER, f"data.path={corpus}", f"norm={norm}"]
    for name, hardware in (("one", "cpu"), ("two", "ddp_cpu")):
        code, _, err = finish(
            spawn(*common, f"hardware={hardware}", f"hydra.run.dir={tmp_path / name}", cwd=tmp_path))
        assert (code, err) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    one, two = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    check_close(one, two)
    assert two.info["device"]["devices"] == 2
    assert two.info["status"] == "done"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ddp_with_one_device(corpus: Path, tmp_path: Path) -> None:
    for strategy in ("auto", "ddp"):
        settings = [*TINY, f"data.path={corpus}", f"hardware.strategy={strategy}", f"output_dir={tmp_path / strategy}"]
        code, _, err = finish(spawn("-m", *settings, "norm=layernorm,batchnorm", cwd=tmp_path))
        assert (code, err) == (0, "")
    one, ddp = (runs_of(next((tmp_path / strategy / "sweeps").iterdir())) for strategy in ("auto", "ddp"))
    assert len(one) == 2
    for name, run in one.items():
        check_close(run, ddp[name])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_multirun_has_one_directory_a_job(corpus: Path, tmp_path: Path) -> None:
    code, out, err = finish(
        spawn("-m", *TINY, f"data.path={corpus}", "hardware=ddp_cpu", "norm=layernorm,rmsnorm", cwd=tmp_path))
    assert (code, err) == (0, "")
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    names = ["layernorm-pre-h2-s1337", "rmsnorm-pre-h2-s1337"]
    assert sorted(p.name for p in sweep.iterdir() if (p / "run.json").exists()) == names
    assert [p.name for p in (tmp_path / "outputs").iterdir()] == ["sweeps"]
    for name in names:
        rows = read_metrics(sweep / name / "metrics.csv")
        assert [row["step"] for row in rows if "val/loss" in row] == [0, 8, 16, 24]
        assert Run.open(sweep / name).info["status"] == "done"
    assert "2 jobs, best val/loss first" in out


@pytest.mark.slow
@pytest.mark.exhaustive
def test_interrupted_and_resumed(corpus: Path, tmp_path: Path) -> None:
    from tests.cli.test_interruption import wait_for_rows

    common = [*TINY, f"data.path={corpus}", "max_steps=300", "hardware=ddp_cpu"]
    unbroken, folder = tmp_path / "unbroken", tmp_path / "run"
    assert finish(spawn(*common, f"hydra.run.dir={unbroken}", cwd=tmp_path))[0] == 0
    process = spawn(*common, f"hydra.run.dir={folder}", cwd=tmp_path)
    wait_for_rows(folder, 8, process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 143, out + err
    run = Run.open(folder)
    assert run.info["status"] == "interrupted"
    content = run.checkpoint("last").read_bytes()
    run.checkpoint("last").write_bytes(content[:1000])
    code, _, err = finish(spawn(f"resume={folder}", cwd=tmp_path))
    assert code == 2
    assert err.startswith(f"error: resume={folder}: ")
    assert len(err.splitlines()) == 1
    run.checkpoint("last").write_bytes(content)
    assert finish(spawn(f"resume={folder}", cwd=tmp_path))[0] == 0
    check_close(run, Run.open(unbroken))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_workers_do_not_outlive_their_parent(corpus: Path, tmp_path: Path) -> None:
    from tests.cli.test_interruption import wait_for_rows

    folder = tmp_path / "run"
    common = [*TINY, f"data.path={corpus}", "max_steps=100000", "hardware=ddp_cpu", f"hydra.run.dir={folder}"]
    process = spawn(*common, cwd=tmp_path)
    wait_for_rows(folder, 3, process)
    code, _, err = finish(spawn(f"resume={folder}", cwd=tmp_path))  # a live run is refused, and left alone
    assert (code, err) == (2, f"error: resume={folder}: another process is training this run\n")
    assert Run.open(folder).info["status"] == "running"
    process.kill()
    process.communicate()
    with Run.open(folder).lock(timeout=30):  # free once the workers are gone
        pass


def test_a_batch_that_two_ranks_cannot_share(corpus: Path, tmp_path: Path) -> None:
    code, _, err = finish(spawn(*TINY, f"data.path={corpus}", "hardware=ddp_cpu", "batch_size=5", cwd=tmp_path))
    assert code == 2
    assert err.startswith("error: batch_size=5: must be a multiple of hardware.devices=2")
