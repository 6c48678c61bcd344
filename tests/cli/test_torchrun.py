"""Several processes of one command, as on two machines: one run, one decision, one error, whatever befalls either."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptexp.runs.run import Run
from tests.cli.agents import SLURM, errors, finish_all, kill_all, srun, torchrun
from tests.cli.faulty import faulty
from tests.cli.test_distributed import check_close
from tests.cli.test_interruption import check_same, wait_for_rows
from tests.conftest import TINY, finish, more, runs_of, spawn, timeless

LONGER = ["max_steps=60", "eval_interval=20", "log_interval=5", "model.dropout=0.1"]
STARTED: dict[str, tuple[Callable[..., Any], list[str]]] = {"torchrun": (torchrun, TINY), "srun": (srun, SLURM)}
"""What starts two processes, each with its arguments, and the settings of a tiny run of theirs."""


@pytest.mark.slow
def test_two_machines_follow_one_process(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    common = [*TINY, f"data.path={corpus}", "norm=batchnorm", "model.dropout=0"]
    alone = spawn(*common, f"hydra.run.dir={tmp_path / 'one'}", cwd=tmp_path)
    codes, out, err = finish_all(
        torchrun(*[[*common, "logger=wandb", f"hydra.run.dir={tmp_path / 'two'}"]] * 2, cwd=tmp_path))
    assert (codes, errors(err)) == ([0, 0], [])
    assert finish(alone)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    one, two = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    check_close(one, two)
    assert two.info["status"] == "done"
    assert len(list((tmp_path / "two" / "wandb").glob("offline-run-*"))) == 1
    assert out.count("step 24/24") == 1  # one of the two speaks
    assert two.log_path.read_text().count("started: ") == 2  # but both trained


@pytest.mark.slow
@pytest.mark.parametrize("by", ["srun", more("torchrun")])
def test_killed_and_resumed_to_the_bit(by: str, corpus: Path, tmp_path: Path) -> None:
    start, settings = STARTED[by]
    common = [*settings, *LONGER, f"data.path={corpus}"]
    for name in ("unbroken", "run"):
        both = start(*[[*common, f"hydra.run.dir={tmp_path / name}"]] * 2, cwd=tmp_path)
        if name == "unbroken":
            assert finish_all(both)[0] == [0, 0]
    wait_for_rows(tmp_path / "run", 7, both[0])
    kill_all(both)
    run = Run.open(tmp_path / "run")
    assert run.info["status"] == "running"
    codes, out, err = finish_all(start(*[[f"resume={tmp_path / 'run'}"]] * 2, cwd=tmp_path))
    assert (codes, errors(err)) == ([0, 0], [])
    assert out.count("resuming") == 1
    check_same(run, Run.open(tmp_path / "unbroken"))
    assert (run.info["device"]["devices"], run.info["device"]["nodes"]) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torchrun", more("srun")])
def test_a_multirun_killed_and_continued(by: str, corpus: Path, tmp_path: Path) -> None:
    start, settings = STARTED[by]
    common = ["-m", *settings, *LONGER, f"data.path={corpus}", "norm=layernorm,batchnorm"]
    for name in ("unbroken", "killed"):
        both = start(*[[*common, f"hydra.sweep.dir={tmp_path / name}"]] * 2, cwd=tmp_path)
        if name == "unbroken":
            codes, out, err = finish_all(both)
            assert codes == [0, 0], err
            assert out.count("2 jobs, best val/loss first") == 1
    wait_for_rows(tmp_path / "killed" / "batchnorm-pre-h2-s1337", 5, both[0])
    kill_all(both)
    assert [r.info["status"] for r in runs_of(tmp_path / "killed").values()] == ["running", "done"]
    codes, out, err = finish_all(start(*[[*common, f"hydra.sweep.dir={tmp_path / 'killed'}"]] * 2, cwd=tmp_path))
    assert codes == [0, 0], err
    killed, unbroken = runs_of(tmp_path / "killed"), runs_of(tmp_path / "unbroken")
    assert list(killed) == list(unbroken) == ["batchnorm-pre-h2-s1337", "layernorm-pre-h2-s1337"]
    for name, run in killed.items():
        check_same(run, unbroken[name])
        assert run.info["device"]["devices"] == 2
    assert killed["layernorm-pre-h2-s1337"].log_path.read_text().count("started: ") == 2  # not begun again


@pytest.mark.slow
@pytest.mark.parametrize(("by", "rank", "how"), [
    ("torchrun", 1, "kill"), more("torchrun", 0, "raise"), more("torchrun", 1, "raise"), more("torchrun", 0, "kill"),
    more("srun", 0, "raise"), more("srun", 1, "raise"),
])  # fmt: skip
def test_a_failure_of_one_ends_all_with_one_line(by: str, rank: int, how: str, corpus: Path, tmp_path: Path) -> None:
    start, settings = STARTED[by]
    common = [*settings, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}", *faulty(rank, how)]
    codes, _, err = finish_all(start(*[common] * 2, cwd=tmp_path))
    assert codes == [1, 1]  # also torchrun's own, whatever the processes end with
    run = Run.open(tmp_path / "run")
    (line,) = errors(err)
    if how == "raise":
        log = f"traceback in {run.log_path}"
        assert line == f"error: rank {rank}: ValueError: of this rank alone; {log}"
        assert "raise ValueError" in run.log_path.read_text()
    else:
        assert line.startswith(f"error: rank {1 - rank}: another process is gone")
    if (rank, how) != (0, "kill"):
        assert run.info["status"] == "failed"
        assert run.info["error"] == line.removeprefix("error: ")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_failure_ends_a_process_that_waits_for_nobody(corpus: Path, tmp_path: Path) -> None:
    """As one does that waits for a GPU, which no error of another process reaches."""
    stalled = [argument.replace("faulty.", "stalled.") if argument.startswith("+") else argument
               for argument in faulty(1, "stall", 9)]  # fmt: skip
    stalled[0] = "+callbacks.stalled._target_=tests.cli.faulty.Faulty"
    common = [*TINY, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}", *faulty(0, "raise", 9), *stalled]
    codes, _, err = finish_all(torchrun(*[common] * 2, cwd=tmp_path))
    assert codes == [1, 1]
    assert len(errors(err)) == 1


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("multirun", [False, True])
def test_a_signal_to_one_agent_saves_the_run(multirun: bool, corpus: Path, tmp_path: Path) -> None:
    flags = ["-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}"] if multirun else [f"hydra.run.dir={tmp_path / 'run'}"]
    folder = tmp_path / ("layernorm-pre-h2-s1" if multirun else "run")
    common = [*flags, *TINY, f"data.path={corpus}", "max_steps=100000"]
    agents = torchrun(*[common] * 2, cwd=tmp_path)
    wait_for_rows(folder, 5, agents[0])
    agents[1].send_signal(signal.SIGTERM)
    codes, _, err = finish_all(agents)
    assert 0 not in codes
    assert errors(err) == []
    run = Run.open(folder)
    assert run.info["status"] == "interrupted"
    assert sorted(r.name for r in folder.parent.glob("*s2")) == []  # no other job has begun
    steps = int(timeless(run)[-1][0])
    assert f"interrupted at step {steps} and saved" in run.log_path.read_text()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_workers_do_not_outlive_their_agents(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    common = [*TINY, f"data.path={corpus}", "max_steps=100000", f"hydra.run.dir={folder}"]
    agents = torchrun(*[common] * 2, cwd=tmp_path)
    wait_for_rows(folder, 5, agents[0])
    for agent in agents:
        agent.kill()
        agent.communicate()
    with Run.open(folder).lock(timeout=60):  # free once the workers are gone
        assert Run.open(folder).info["status"] == "interrupted"  # and they have saved


@pytest.mark.slow
@pytest.mark.parametrize("how", ["run", more("multirun"), more("resume")])
def test_two_machines_with_different_settings(how: str, corpus: Path, tmp_path: Path) -> None:
    common = [*TINY, f"data.path={corpus}"]
    folder = tmp_path / "run"
    if how == "resume":
        assert finish(spawn(*common, f"hydra.run.dir={folder}", cwd=tmp_path))[0] == 0
        each = [[f"resume={folder}"], [f"resume={folder}", "seed=5"]]
    elif how == "run":
        each = [[*common, f"hydra.run.dir={folder}", f"seed={seed}"] for seed in (1, 5)]
    else:
        each = [["-m", *common, f"hydra.sweep.dir={folder}", f"seed={seed}"] for seed in ("1,2", "1,5")]
    before = sorted(folder.rglob("*"))
    codes, _, err = finish_all(torchrun(*each, cwd=tmp_path))
    assert codes == [1, 1]
    first, second = {"run": ("1", "5"), "multirun": ("1,2", "1,5"), "resume": ("1337", "5")}[how]
    assert errors(err) == [f"error: seed={second} on rank 1 differs from seed={first} on rank 0; "
                           "start all processes with the same settings"]  # fmt: skip
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(("by", "wrong", "line"), [
    ("torchrun", ["norm=rmsnrom"], "norm=rmsnrom: unknown; did you mean rmsnorm?"),
    more("torchrun", ["batch_size=5"], "batch_size=5: must be a multiple of 2 processes * gradient_accumulation_steps"),
    more("torchrun", ["-m", "seed=1,2", "hydra/launcher=joblib"], "hydra/launcher: torchrun or srun has started "),
    more("srun", ["norm=rmsnrom"], "norm=rmsnrom: unknown; did you mean rmsnorm?"),
])  # fmt: skip
def test_a_mistake_of_all_is_told_once(by: str, wrong: list[str], line: str, corpus: Path, tmp_path: Path) -> None:
    start, settings = STARTED[by]
    flags = [argument for argument in wrong if argument == "-m"]
    command = [*flags, *settings, f"data.path={corpus}", *wrong[len(flags) :]]
    codes, _, err = finish_all(start(command, command, cwd=tmp_path))
    assert codes == ([1, 1] if by == "torchrun" else [2, 2])
    (told,) = errors(err)
    assert told.startswith(f"error: {line}")
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_tells_each_trial_to_all(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    common = ["-m", *TINY, f"data.path={corpus}", "hydra/sweeper=optuna", f"hydra.sweep.dir={tmp_path / 'search'}",
              "optimizer.learning_rate=1e-3,1e-7,2e-3", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler=random",
              "hydra.sweeper.startup_trials=1"]  # fmt: skip
    codes, out, err = finish_all(torchrun(*[common] * 2, cwd=tmp_path))
    assert codes == [0, 0], err
    runs = runs_of(tmp_path / "search")
    assert len(runs) == 3
    assert {run.info["status"] for run in runs.values()} == {"done", "pruned"}
    assert out.count("best: val/loss") == 1
    assert {run.info["device"]["devices"] for run in runs.values()} == {2}
