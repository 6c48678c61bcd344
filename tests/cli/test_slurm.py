"""Processes with the variables that Slurm's srun sets; no Slurm is needed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp.runs import Run
from tests.cli import slurm
from tests.cli.agents import errors, finish_all, kill_all, srun
from tests.cli.faulty import faulty
from tests.cli.test_distributed import check_close
from tests.cli.test_interruption import check_same, wait_for_rows
from tests.conftest import TINY, finish, more, runs_of, spawn

SLURM = [o for o in TINY if o != "hardware=cpu"]
SLURM += ["hardware=slurm", "max_steps=60", "eval_interval=20", "log_interval=5"]


@pytest.mark.slow
def test_killed_and_resumed_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    common = [*SLURM, f"data.path={corpus}"]
    alone = spawn(*common, "hardware=cpu", f"hydra.run.dir={tmp_path / 'one'}", cwd=tmp_path)
    for name in ("unbroken", "run"):
        tasks = srun(*[[*common, f"hydra.run.dir={tmp_path / name}"]] * 2, cwd=tmp_path)
        if name == "unbroken":
            codes, out, err = finish_all(tasks)
            assert (codes, err) == ([0, 0], "")
            assert out.count("step 60/60") == 1
    wait_for_rows(tmp_path / "run", 7, tasks[0])
    kill_all(tasks)
    run, unbroken = Run.open(tmp_path / "run"), Run.open(tmp_path / "unbroken")
    codes, out, err = finish_all(srun(*[[f"resume={tmp_path / 'run'}"]] * 2, cwd=tmp_path))
    assert (codes, err) == ([0, 0], "")
    check_same(run, unbroken)
    assert (run.info["device"]["devices"], run.info["device"]["nodes"]) == (2, 2)
    assert finish(alone)[0] == 0
    check_close(Run.open(tmp_path / "one"), run)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_multirun(corpus: Path, tmp_path: Path) -> None:
    common = ["-m", *SLURM, f"data.path={corpus}", "norm=layernorm,rmsnorm", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    tasks = srun(*[common] * 2, cwd=tmp_path)
    wait_for_rows(tmp_path / "sweep" / "rmsnorm-pre-h2-s1337", 5, tasks[0])
    kill_all(tasks)
    codes, out, err = finish_all(srun(*[common] * 2, cwd=tmp_path))
    assert (codes, err) == ([0, 0], "")
    assert out.count("2 jobs, best val/loss first") == 1
    runs = runs_of(tmp_path / "sweep")
    assert list(runs) == ["layernorm-pre-h2-s1337", "rmsnorm-pre-h2-s1337"]
    assert all(run.info["status"] == "done" and run.info["device"]["devices"] == 2 for run in runs.values())


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_tasks_saves_the_run(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tasks = srun(*[[*SLURM, f"data.path={corpus}", "max_steps=100000", f"hydra.run.dir={folder}"]] * 2, cwd=tmp_path)
    wait_for_rows(folder, 5, tasks[0])
    for task in tasks:
        task.send_signal(number)
    codes, out, err = finish_all(tasks)
    assert (codes, err) == ([128 + number] * 2, "")
    assert f"resume={folder}" in out
    assert Run.open(folder).info["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_one_task_ends_all_with_one_line(rank: int, corpus: Path, tmp_path: Path) -> None:
    common = [*SLURM, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}", *faulty(rank, "raise")]
    codes, _, err = finish_all(srun(*[common] * 2, cwd=tmp_path))
    assert codes == [1, 1]
    assert err.startswith(f"error: rank {rank}: ValueError: of this rank alone; traceback in ")
    assert len(err.splitlines()) == 1
    assert Run.open(tmp_path / "run").info["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("present", [0, more(1)])
def test_a_rendezvous_that_not_all_join(present: int, corpus: Path, tmp_path: Path) -> None:
    common = [*SLURM, f"data.path={corpus}", "hardware.timeout=1", f"hydra.run.dir={tmp_path / 'run'}"]
    tasks = srun(*[common] * 2, cwd=tmp_path, only=present)
    codes, _, err = finish_all(tasks)
    assert codes == [2]
    (line,) = err.splitlines()
    assert line.startswith(f"error: rank {present} of 2: not all processes came to 127.0.0.1:")
    assert line.endswith(" within 1 s")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_mistake_of_all_tasks_is_told_once(corpus: Path, tmp_path: Path) -> None:
    codes, _, err = finish_all(srun(*[[*SLURM, f"data.path={corpus}", "norm=rmsnrom"]] * 2, cwd=tmp_path))
    assert codes == [2, 2]
    assert len(errors(err)) == len(err.splitlines()) == 1


class TestWithoutTheOthers:
    def test_without_srun(
        self, command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for folder, flags in (("hydra.run.dir", []), ("hydra.sweep.dir", ["-m", "seed=1,2"])):
            assert command(*flags, *SLURM, f"data.path={corpus}", f"{folder}={tmp_path / 'run'}") == 2
            assert capfd.readouterr().err == (
                "error: hardware.cluster=slurm: Slurm has not started this process; start it with srun\n")
        assert not list(tmp_path.rglob("run.json"))

    def test_several_machines_need_a_launcher(
        self, command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert command(*TINY, f"data.path={corpus}", "hardware.num_nodes=2", f"hydra.run.dir={tmp_path / 'run'}") == 2
        assert capfd.readouterr().err == (
            "error: hardware.num_nodes=2: this command starts processes on one machine; for several, start it with "
            "torchrun or srun\n")

    def test_a_task_count_that_lightning_does_not_take(
        self, command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("SLURM_PROCID", "0")
        monkeypatch.setenv("SLURM_NTASKS", "2")
        assert command(*SLURM, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}") == 2
        assert capfd.readouterr().err == (
            "error: hardware.cluster=slurm: give srun --ntasks-per-node instead of --ntasks\n")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", [False, True])
def test_submitit_with_several_machines_per_job(fault: bool, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name in ("sbatch", "srun", "sacct", "scancel"):
        (tmp_path / name).symlink_to(Path(slurm.__file__))
    Path(slurm.__file__).chmod(0o755)
    settings = [*SLURM, f"data.path={corpus}", "norm=layernorm,rmsnorm", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1"]
    paths = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    code, out, err = finish(
        spawn("-m", *settings, *launcher, *(faulty(1, "raise") if fault else []), cwd=tmp_path, env=paths))
    assert (tmp_path / "sweep").is_dir(), out + err
    runs = runs_of(tmp_path / "sweep")
    assert list(runs) == ["layernorm-pre-h2-s1337", "rmsnorm-pre-h2-s1337"], out + err
    assert {run.info["device"]["devices"] for run in runs.values()} == {2}
    if fault:
        assert (code, err) == (1, "error: 2 of 2 jobs failed\n")
        assert {run.info["status"] for run in runs.values()} == {"failed"}
        table = out.partition("--- 2 jobs")[2]
        assert table.count("rank 1: ValueError: of this rank alone") == 2
    else:
        assert (code, err) == (0, "")
        assert {run.info["status"] for run in runs.values()} == {"done"}
