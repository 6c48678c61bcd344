"""Processes with the variables that Slurm's srun sets; no Slurm is needed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp.runs.run import Run
from tests.cli import slurm
from tests.cli.agents import SLURM, finish_all, srun
from tests.cli.faulty import faulty
from tests.cli.test_interruption import wait_for_rows
from tests.conftest import TINY, finish, more, runs_of, spawn


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


@pytest.mark.parametrize(("overrides", "variables", "line"), [
    (SLURM, {}, "hardware.cluster=slurm: Slurm has not started this process; start it with srun"),
    (["-m", "seed=1,2", *SLURM], {}, "hardware.cluster=slurm: Slurm has not started this process; start it with srun"),
    (SLURM, {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
     "hardware.cluster=slurm: give srun --ntasks-per-node instead of --ntasks"),
    ([*TINY, "hardware.num_nodes=2"], {},
     "hardware.num_nodes=2: this command starts processes on one machine; for several, start it with torchrun or srun"),
])  # fmt: skip
def test_processes_that_nothing_has_started(
    overrides: list[str], variables: dict[str, str], line: str, command: Callable[..., int], corpus: Path,
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command(*overrides, f"data.path={corpus}", f"output_dir={tmp_path / 'out'}") == 2
    assert capfd.readouterr().err == f"error: {line}\n"
    assert not list(tmp_path.rglob("run.json"))


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
