"""What W&B holds of a run, read back from its files, and that nothing which happens to W&B costs a run."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptexp.records import read_metrics, read_samples
from gptexp.runs import Run
from tests.cli.wandb_file import Record, read_run, read_so_far
from tests.cli.wandb_server import Server, serving
from tests.conftest import REPOSITORY, TINY, failing, finish, more, runs_of, spawn, timeless

LONG = ["max_steps=100000", "eval_interval=100000", "checkpoint_interval=50", "eval_windows=2"]
STOCK = ["+logger.stock._target_=lightning.pytorch.loggers.WandbLogger", "+logger.stock.offline=true",
         "+logger.stock.project=theirs", "+logger.stock.tags=[mine]"]  # fmt: skip

Command = Callable[..., int]
Tiny = Callable[..., Run]


def file_of(run: Run) -> Path:
    """That of W&B; where a server did not answer, another one was begun first."""
    (file,) = list(run.path.glob("wandb/offline-run-*/run-*.wandb")) or run.path.glob("wandb/run-*/run-*.wandb")
    return file


def logged(record: Record, name: str) -> dict[int, dict[str, Any]]:
    """The rows of a W&B run that have this metric, by step; without what W&B adds to them."""
    rows = [{k: v for k, v in row.items() if not k.startswith(("_", "gradients/"))}
            for row in record.history if name in row]  # fmt: skip
    return {row.pop("trainer/global_step"): row for row in rows}


def written(run: Run, name: str) -> dict[int, dict[str, float]]:
    """The same of metrics.csv."""
    rows = [row for row in read_metrics(run.metrics_path) if name in row]
    return {int(row.pop("step")): row for row in rows}


def check_history(record: Record, run: Run) -> None:
    """W&B has every evaluation, and the training metrics of every `log_interval` steps, as metrics.csv has them."""
    train, found = written(run, "train/loss"), logged(record, "train/loss")
    assert {step for step in train if step % run.config.log_interval == 0} <= found.keys()
    assert found
    assert found == {step: {k: v for k, v in train[step].items() if not k.startswith("val/")} for step in found}
    evaluations = written(run, "val/loss")
    assert evaluations
    for step, row in logged(record, "val/loss").items():
        assert row.pop("seconds") >= 0  # what else an evaluation can be drawn over
        expected = {k: v for k, v in evaluations.pop(step).items() if k == "tokens" or k.startswith("val/")}
        assert row == expected
    assert not evaluations
    tables = logged(record, "samples/path")
    assert list(tables) == [step for step, _ in read_samples(run.samples_path)]


@pytest.fixture
def sweep(command: Command, corpus: Path, tmp_path: Path) -> Callable[..., dict[str, Run]]:
    def run(*overrides: str) -> dict[str, Run]:
        assert command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path / 'out'}", *overrides) == 0
        (folder,) = (tmp_path / "out" / "sweeps").iterdir()
        return runs_of(folder)

    return run


def test_each_job_is_a_wandb_run_of_its_own(sweep: Callable[..., dict[str, Run]]) -> None:
    runs = sweep("logger=wandb", "logger.wandb.tags=[mine]", "norm=layernorm,rmsnorm")
    assert len(runs) == 2
    identities = set()
    for name, run in runs.items():
        file = file_of(run)
        record, config = read_run(file), run.config
        identities.add(record.id)
        assert record.id == run.info["loggers"]["wandb"]
        assert (record.name, record.group, record.project) == (name, run.path.parent.name, "gptexp")
        assert record.job_type == "train"
        assert set(record.tags) == {config.model.norm, "pre", "h2", "file", "mine"}
        settings = replace(config, model=config.sized(27)).essence()
        stored = {k: json.loads(v) for k, v in record.config.items() if k != "_wandb"}
        assert stored == json.loads(json.dumps(settings))
        assert set(stored["model"]["norms"]) == {config.model.norm}  # and no setting of others
        check_history(record, run)
        assert "step" not in {key for row in record.history for key in row}
        assert record.metrics["val/loss"] == ("trainer/global_step", True)  # x-axis, and the minimum in the summary
        losses = [row["val/loss"] for row in written(run, "val/loss").values()]
        assert json.loads(record.summary["val/loss"]) == {"min": min(losses), "last": losses[-1]}
        assert json.loads(record.summary["parameters"]) == run.info["parameters"]
        assert (record.summary["status"], record.exit_code) == ('"done"', 0)
        table = json.loads((file.parent / "files" / list(logged(record, "samples/path").values())[-1]["samples/path"])
                           .read_text())  # fmt: skip
        assert table["columns"] == ["step", "text"]
        assert [tuple(row) for row in table["data"]] == read_samples(run.samples_path)
        ((step, figure),) = logged(record, "curves/filenames").items()
        (picture,) = figure["curves/filenames"]
        assert step == 24
        assert (file.parent / "files" / picture).read_bytes() == run.curves_path.read_bytes()
    assert len(identities) == 2


def test_lightnings_own_logger(sweep: Callable[..., dict[str, Run]]) -> None:
    """Whose run goes on until it is told to end; the next job would go on in it."""
    for name, run in sweep(*STOCK, "seed=1,2").items():
        record = read_run(file_of(run))
        assert record.id == run.info["loggers"]["stock"]
        assert (record.name, record.group, record.project) == (name, run.path.parent.name, "theirs")
        assert set(record.tags) == {"layernorm", "pre", "h2", "file", "mine"}
        check_history(record, run)
        assert (record.summary["status"], record.exit_code) == ('"done"', 0)


def test_checkpoints_and_gradients(tiny: Tiny, corpus: Path) -> None:
    run = tiny("run", "logger=wandb", "logger.wandb.log_model=true", "logger.wandb.watch=gradients")
    record = read_run(file_of(run))
    assert record.artifacts[f"model:model-{record.id}"] == ["model.ckpt"]
    seen = {key.split("/")[1] for row in record.history for key in row if key.startswith("gradients/")}
    assert {"model.wte.weight", "model.norm_f.weight"} <= seen
    check_history(record, run)
    assert timeless(run) == timeless(tiny("other"))  # it looks on, and no more


def test_online_without_a_key_is_offline(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    run = tiny("run", "logger=wandb", "logger.wandb.mode=online", "max_steps=1")
    out, err = capfd.readouterr()
    assert err == ""
    assert "W&B has no API key; the run is kept offline\n" in out
    assert f"W&B: offline; upload it later with: wandb sync {file_of(run).parent}\n" in out


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_a_run_that_does_not_reach_its_end(status: str, command: Command, corpus: Path, tmp_path: Path) -> None:
    settings = [*TINY, "logger=wandb", f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}"]
    if status == "failed":
        with failing():
            assert command(*settings) == 1
    else:
        command(*settings, "optimizer=sgd", "optimizer.learning_rate=1e38", "grad_clip=0")
    run = Run.open(tmp_path / "run")
    assert run.info["status"] == status
    record = read_run(file_of(run))
    assert record.exit_code == 1
    assert record.summary.get("status") == {"failed": None, "diverged": '"diverged"'}[status]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(command: Command, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with failing(15):
        assert command(*TINY, "logger=wandb", f"data.path={corpus}", f"hydra.run.dir={folder}") == 1
    assert command(f"resume={folder}") == 0
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    records = [read_run(file) for file in files]
    assert len(records) == 2
    assert records[0].id == records[1].id == Run.open(folder).info["loggers"]["wandb"]
    assert records[0].name == records[1].name
    assert [record.exit_code for record in records] == [1, 0]
    assert list(logged(records[1], "train/loss")) == [12, 15, 18, 21, 24]  # from the checkpoint on
    tables = [row["samples/nrows"] for row in records[1].history if "samples/nrows" in row]
    assert tables[-1] == 4  # those from before the interruption, too


def test_the_group_of_the_environment(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    assert read_run(file_of(tiny("run", "logger=wandb", "max_steps=1"))).group == "theirs"
    named = tiny("named", "logger=wandb", "max_steps=1", "logger.wandb.group=mine", "logger.wandb.name=my run",
                 "+logger.wandb.id=abc")  # fmt: skip
    record = read_run(file_of(named))
    assert (record.group, record.name, record.id) == ("mine", "my run", "abc")


def test_what_wandb_does_not_take_is_one_line(
    command: Command, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [*TINY, "logger=wandb", f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert command(*settings, "logger.wandb.project=a/b") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: logger.wandb: Invalid project name")
    assert Run.open(tmp_path / "run").info["status"] == "failed"
    assert command(*settings[:-1], f"hydra.run.dir={tmp_path / 'other'}", "logger.wandb.mode=of") == 2
    told = "error: logger.wandb.mode=of: must be one of auto, online, offline\n"
    assert capfd.readouterr().err == told
    assert not (tmp_path / "other").exists()


class Processes:
    """The processes that come from one test, known by a variable of their environment."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def living(self) -> dict[int, str]:
        """Each one's command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                        found[int(folder.name)] = command
            except OSError:  # it has just ended, or is another user's
                continue
        return found

    def wandb(self) -> list[int]:
        """W&B's own."""
        return [pid for pid, command in self.living().items() if "wandb-core" in command.partition(" ")[0]]

    def all_end(self) -> bool:
        """Whether they end by themselves."""
        return wait_for(lambda: not self.living())


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 240) -> bool:
    """Whether a condition comes true in time; says what a process has printed that has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def rows(folder: Path) -> int:
    path = folder / "metrics.csv"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


@pytest.fixture
def processes() -> Iterator[Processes]:
    if not Path("/proc/self/environ").exists():
        pytest.skip("looks for processes in /proc")
    found = Processes()
    yield found
    for pid in found.living():
        os.kill(pid, signal.SIGKILL)


Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def begin(processes: Processes, corpus: Path, tmp_path: Path) -> Begin:
    """Begins a real process of the command line, with more overrides and environment variables."""

    def run(*overrides: str, **env: str) -> subprocess.Popen[str]:
        flags = [o for o in overrides if o.startswith("-")]  # which stand before the settings
        settings = [*flags, *TINY, "logger=wandb", f"data.path={corpus}", *(o for o in overrides if o not in flags)]
        shared = {"PYTHONPATH": str(REPOSITORY), "GPTEXP_TEST": processes.mark}
        return spawn(*settings, cwd=tmp_path, env=os.environ | shared | env)

    return run


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.mark.slow
def test_what_ran_is_told(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin(f"hydra.run.dir={folder}")
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert not processes.living()  # W&B's own has ended before the program
    run = Run.open(folder)
    assert out.count(f"W&B: offline; upload it later with: wandb sync {file_of(run).parent}\n") == 1
    record = read_run(file_of(run))
    assert record.exit_code == 0
    assert record.program == "-m gptexp.train"
    assert record.args == process.args[3:]  # type: ignore[index]
    assert {"torch", "lightning"} <= record.imported
    check_history(record, run)


@pytest.mark.slow
def test_a_killed_run_stays_unfinished(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin(f"hydra.run.dir={folder}", "log_interval=1", *LONG)
    assert wait_for(lambda: rows(folder) > 300, process)
    process.kill()
    process.communicate()
    assert processes.all_end()
    run = Run.open(folder)
    record = read_so_far(file_of(run))
    assert record.exit_code is None
    assert record.id == run.info["loggers"]["wandb"]
    steps = list(logged(record, "train/loss"))
    assert len(steps) > 30  # all but the last block of the file, which W&B holds back
    assert steps == list(written(run, "train/loss"))[: len(steps)]


@pytest.mark.slow
def test_ctrl_c_is_told(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    """It ends the run in W&B, as one that did not reach its end, once what was logged is there."""
    folder = tmp_path / "run"
    process = begin(f"hydra.run.dir={folder}", *LONG)
    assert wait_for(lambda: rows(folder) > 3, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (130, "")
    assert processes.all_end()
    run = Run.open(folder)
    record = read_run(file_of(run))
    assert (record.exit_code, record.summary["status"]) == (1, '"interrupted"')
    steps = [step for step in written(run, "train/loss") if step % 3 == 0]
    assert list(logged(record, "train/loss")) == steps


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_while_wandb_waits_for_its_server(
    number: signal.Signals, status: int, begin: Begin, processes: Processes, server: Server, tmp_path: Path
) -> None:
    server.hanging.set()
    folder = tmp_path / "run"
    process = begin(f"hydra.run.dir={folder}", **server.environment)
    assert server.asking.wait(120)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == status
    assert "Traceback" not in err
    assert "W&B" not in out  # neither that it was reached nor that it was not
    assert processes.all_end()
    if number == signal.SIGINT:
        assert Run.open(folder).info["status"] == "interrupted"
    assert rows(folder) <= 0


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sweep_whose_wandb_is_killed_goes_on(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    process = begin("-m", "seed=1,2", "max_steps=1000", "eval_interval=500", f"output_dir={tmp_path / 'out'}")
    found: list[Path] = []

    def training() -> bool:
        found[:] = (tmp_path / "out").glob("sweeps/*/*/metrics.csv")
        return bool(found) and rows(found[0].parent) > 5

    assert wait_for(training, process)
    first = found[0].parent
    (pid,) = processes.wandb()
    os.kill(pid, signal.SIGKILL)
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert processes.all_end()
    told = "W&B: its process has ended; the run goes on, and keeps its samples and checkpoints in "
    assert told in (first / "train.log").read_text() + out
    runs = runs_of(first.parent)
    assert {run.info["status"] for run in runs.values()} == {"done"}
    (other,) = (run for run in runs.values() if run.path.name != first.name)
    assert read_so_far(file_of(runs[first.name])).exit_code is None
    record = read_run(file_of(other))
    assert record.exit_code == 0
    check_history(record, other)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_jobs_side_by_side(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    code, _, err = finish(begin("-m", "seed=1,2,3,4", f"output_dir={tmp_path / 'out'}", *launcher))
    assert code == 0, err
    assert processes.all_end()
    (folder,) = (tmp_path / "out" / "sweeps").iterdir()
    runs = runs_of(folder)
    assert len(runs) == 4
    for name, run in runs.items():
        record = read_run(file_of(run))
        assert (record.name, record.group, record.exit_code) == (name, folder.name, 0)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_processes_that_train_together(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    code, _, err = finish(begin("hardware=ddp_cpu", f"hydra.run.dir={tmp_path / 'run'}"))
    assert code == 0, err
    assert processes.all_end()
    run = Run.open(tmp_path / "run")
    record = read_run(file_of(run))
    assert record.exit_code == 0
    check_history(record, run)


@pytest.mark.slow
def test_a_run_online(begin: Begin, processes: Processes, server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, out, err = finish(begin(f"hydra.run.dir={folder}", "logger.wandb.log_model=true", **server.environment))
    assert (code, err) == (0, "")
    assert not processes.living()
    run = Run.open(folder)
    identity = run.info["loggers"]["wandb"]
    assert f"W&B: {server.url}/team/gptexp/runs/{identity}\n" in out
    record = read_run(file_of(run))
    record.history = server.history[identity]
    check_history(record, run)
    assert {f"run-{identity}-samples", f"model-{identity}"} <= set(server.artifacts)
    assert "RunResumeStatus" in server.asked  # so that a run that is resumed goes on


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("vanishes", [False, True], ids=["hangs", "vanishes"])
def test_a_server_that_is_lost_costs_no_run(
    vanishes: bool, begin: Begin, processes: Processes, server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = ["max_steps=1000", "eval_interval=200", "sample_tokens=1"]
    process = begin(f"hydra.run.dir={folder}", *settings, **server.environment)
    assert wait_for(lambda: rows(folder) > 70, process)
    server.hanging.set()
    if vanishes:
        server.socket.close()
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert processes.all_end()
    run = Run.open(folder)
    assert run.info["status"] == "done"
    kept = f"the run goes on, and keeps its samples and checkpoints in {folder} alone"
    assert out.count(f"W&B: no answer within 10 s; {kept}") == 1
    assert f"W&B has not taken everything in time; upload the rest with: wandb sync {file_of(run).parent}\n" in out
    record = read_run(file_of(run))  # which has it all
    assert list(logged(record, "val/loss")) == list(written(run, "val/loss"))
    assert record.exit_code == 0


@pytest.mark.slow
def test_ctrl_c_while_wandb_waits_at_the_end(
    begin: Begin, processes: Processes, server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    patient = server.environment | {"WANDB_FINISH_TIMEOUT": "300"}
    process = begin(f"hydra.run.dir={folder}", "sample_tokens=0", **patient)
    assert wait_for(lambda: rows(folder) > 1, process)
    server.hanging.set()
    diary = file_of(Run.open(folder)).parent / "logs" / "debug.log"  # W&B's own
    assert wait_for(lambda: "finishing run" in diary.read_text())
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "Traceback" not in err
    assert processes.all_end()
    assert Run.open(folder).info["status"] == "done"


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Whether W&B has begun in this process, which then says so to the programs that it starts."""
    import wandb

    wandb.teardown()  # what an earlier test has begun
    if request.param:
        wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)).finish()
    assert ("WANDB_SERVICE" in os.environ) == request.param
    yield
    wandb.teardown()


@pytest.mark.slow
@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("served", [more(False), True], indirect=True)
@pytest.mark.parametrize("refuses", [more(False), True], ids=["hangs", "refuses"])
def test_a_server_that_does_not_answer_costs_no_run(
    refuses: bool, begin: Begin, processes: Processes, server: Server, tmp_path: Path
) -> None:
    server.hanging.set()
    if refuses:
        server.socket.close()
    folder = tmp_path / "run"
    code, out, err = finish(begin(f"hydra.run.dir={folder}", **server.environment))
    assert (code, err) == (0, "")
    assert "W&B cannot be reached" in out
    assert processes.all_end()
    run = Run.open(folder)
    assert f"wandb sync {file_of(run).parent}\n" in out
    check_history(read_run(file_of(run)), run)


@pytest.mark.slow
def test_nothing_is_asked_in_a_terminal(processes: Processes, corpus: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    settings = [*TINY, "logger=wandb", f"data.path={corpus}", "max_steps=1", f"hydra.run.dir={tmp_path / 'run'}"]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "GPTEXP_TEST": processes.mark}
    process = subprocess.Popen([sys.executable, "-m", "gptexp.train", *settings], cwd=tmp_path, env=env, stdin=theirs,
                               stdout=theirs, stderr=theirs)  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while select.select([ours], [], [], 120)[0] and (part := os.read(ours, 1000)):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0
    assert b"W&B: offline" in shown
    assert b"wandb: " not in shown


@pytest.mark.slow
def test_an_interrupted_run_is_uploaded_as_one(
    command: Command, corpus: Path, server: Server, tmp_path: Path
) -> None:
    """By the command that the README gives: the two parts of it, in the order of time."""
    folder = tmp_path / "run"
    with failing(15):
        assert command(*TINY, "logger=wandb", f"data.path={corpus}", f"hydra.run.dir={folder}") == 1
    assert command(f"resume={folder}") == 0
    run = Run.open(folder)
    parts = sorted(folder.glob("wandb/offline-run-*"))
    for part in parts:
        read_run(next(part.glob("run-*.wandb")))
    env = os.environ | server.environment
    subprocess.run([Path(sys.executable).with_name("wandb"), "sync", *parts], cwd=tmp_path, env=env, check=True,
                   capture_output=True, timeout=120)  # fmt: skip
    sent = server.history[run.info["loggers"]["wandb"]]
    assert [row["trainer/global_step"] for row in sent if "val/loss" in row] == [0, 8, 16, 24]
