"""What W&B holds of a run, read back from its files. Nothing that happens to W&B costs a run."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb

from gptexp.runs.files import read_metrics, read_samples
from gptexp.runs.run import Run
from tests.cli.wandb_file import Record, read_run
from tests.cli.wandb_server import Server, serving
from tests.conftest import REPOSITORY, TINY, failing, finish, more, runs_of, spawn, timeless

LONG = ["max_steps=100000", "eval_interval=100000", "checkpoint_interval=50", "eval_windows=2"]
STOCK = ["+logger.stock._target_=lightning.pytorch.loggers.WandbLogger", "+logger.stock.offline=true",
         "+logger.stock.project=theirs", "+logger.stock.tags=[mine]"]  # fmt: skip

Command = Callable[..., int]
Tiny = Callable[..., Run]


def file_of(run: Run) -> Path:
    """W&B's file; the one that was begun first if a server did not answer."""
    (file,) = list(run.path.glob("wandb/offline-run-*/run-*.wandb")) or run.path.glob("wandb/run-*/run-*.wandb")
    return file


def logged(record: Record, name: str) -> dict[int, dict[str, Any]]:
    """The rows of a W&B run that have this metric, by step, without what W&B adds to them."""
    rows = [{k: v for k, v in row.items() if not k.startswith(("_", "gradients/"))}
            for row in record.history if name in row]  # fmt: skip
    return {row.pop("trainer/global_step"): row for row in rows}


def written(run: Run, name: str) -> dict[int, dict[str, float]]:
    """The same of metrics.csv."""
    return {int(row.pop("step")): row for row in read_metrics(run.metrics_path) if name in row}


def check_history(record: Record, run: Run) -> None:
    """W&B has every evaluation, and the training metrics of every `log_interval` steps, as metrics.csv has them."""
    train, found = written(run, "train/loss"), logged(record, "train/loss")
    assert found
    assert {step for step in train if step % run.config.log_interval == 0} <= found.keys()
    assert found == {step: {k: v for k, v in train[step].items() if not k.startswith("val/")} for step in found}
    evaluations = logged(record, "val/loss")
    assert all(row.pop("seconds") >= 0 for row in evaluations.values())  # can be drawn over time
    kept = {step: {k: v for k, v in row.items() if k == "tokens" or k.startswith("val/")}
            for step, row in written(run, "val/loss").items()}  # fmt: skip
    assert evaluations == kept != {}
    assert list(logged(record, "samples/path")) == [step for step, _ in read_samples(run.samples_path)]


@pytest.fixture
def sweep(command: Command, corpus: Path, tmp_path: Path) -> Callable[..., dict[str, Run]]:
    def run(*overrides: str) -> dict[str, Run]:
        assert command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path / 'out'}", *overrides) == 0
        (folder,) = (tmp_path / "out" / "sweeps").iterdir()
        return runs_of(folder)

    return run


def test_each_job_is_a_wandb_run_of_its_own(sweep: Callable[..., dict[str, Run]]) -> None:
    runs = sweep("logger=wandb", "logger.wandb.tags=[mine]", "norm=layernorm,rmsnorm")
    records = {name: read_run(file_of(run)) for name, run in runs.items()}
    assert len({record.id for record in records.values()}) == 2
    for name, run in runs.items():
        record, config, folder = records[name], run.config, file_of(run).parent / "files"
        assert record.id == run.info["loggers"]["wandb"]
        assert (record.name, record.group, record.project) == (name, run.path.parent.name, "gptexp")
        assert record.job_type == "train"
        assert set(record.tags) == {config.model.norm, "pre", "h2", "file", "mine"}
        stored = {k: json.loads(v) for k, v in record.config.items() if k != "_wandb"}
        assert stored == json.loads(json.dumps(replace(config, model=config.sized(27)).essence()))
        assert set(stored["model"]["norms"]) == {config.model.norm}  # and no setting of others
        check_history(record, run)
        assert not any("step" in row for row in record.history)
        assert record.metrics["val/loss"] == ("trainer/global_step", True)  # x-axis, and the minimum in the summary
        losses = [row["val/loss"] for row in written(run, "val/loss").values()]
        assert json.loads(record.summary["val/loss"]) == {"min": min(losses), "last": losses[-1]}
        assert json.loads(record.summary["parameters"]) == run.info["parameters"]
        assert (record.summary["status"], record.exit_code) == ('"done"', 0)
        table = json.loads((folder / list(logged(record, "samples/path").values())[-1]["samples/path"]).read_text())
        assert table["columns"] == ["step", "text"]
        assert [tuple(row) for row in table["data"]] == read_samples(run.samples_path)
        ((step, figure),) = logged(record, "curves/filenames").items()
        assert step == 24
        assert (folder / figure["curves/filenames"][0]).read_bytes() == run.curves_path.read_bytes()


def test_lightnings_own_logger(sweep: Callable[..., dict[str, Run]]) -> None:
    """Its run goes on until it is told to end; the next job would continue it."""
    for name, run in sweep(*STOCK, "seed=1,2").items():
        record = read_run(file_of(run))
        assert record.id == run.info["loggers"]["stock"]
        assert (record.name, record.group, record.project) == (name, run.path.parent.name, "theirs")
        assert set(record.tags) == {"layernorm", "pre", "h2", "file", "mine"}
        check_history(record, run)
        assert (record.summary["status"], record.exit_code) == ('"done"', 0)


def test_checkpoints_and_gradients(tiny: Tiny) -> None:
    run = tiny("run", "logger=wandb", "logger.wandb.log_model=true", "logger.wandb.watch=gradients")
    record = read_run(file_of(run))
    assert record.artifacts[f"model:model-{record.id}"] == ["model.ckpt"]
    seen = {key.split("/")[1] for row in record.history for key in row if key.startswith("gradients/")}
    assert {"model.wte.weight", "model.norm_f.weight"} <= seen
    check_history(record, run)
    assert timeless(run) == timeless(tiny("other"))  # it only watches


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_a_run_that_does_not_reach_its_end(status: str, command: Command, corpus: Path, tmp_path: Path) -> None:
    settings = [*TINY, "logger=wandb", f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}"]
    if status == "failed":
        with failing():
            assert command(*settings) == 1
    else:
        command(*settings, "optimizer=sgd", "optimizer.learning_rate=1e38", "grad_clip=0")
    run = Run.open(tmp_path / "run")
    record = read_run(file_of(run))
    assert (run.info["status"], record.exit_code) == (status, 1)
    assert record.summary.get("status") == {"failed": None, "diverged": '"diverged"'}[status]


@pytest.fixture
def resumed(command: Command, corpus: Path, tmp_path: Path) -> Run:
    """A run that failed after 15 steps and was resumed from step 10."""
    with failing(15):
        assert command(*TINY, "logger=wandb", f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}") == 1
    assert command(f"resume={tmp_path / 'run'}") == 0
    return Run.open(tmp_path / "run")


def test_a_resumed_run_goes_on_in_the_same_wandb_run(resumed: Run) -> None:
    files = sorted(resumed.path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    first, second = (read_run(file) for file in files)
    assert first.id == second.id == resumed.info["loggers"]["wandb"]
    assert first.name == second.name
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert list(logged(second, "train/loss")) == [12, 15, 18, 21, 24]  # from the checkpoint on
    tables = [row["samples/nrows"] for row in second.history if "samples/nrows" in row]
    assert tables[-1] == 4  # those from before the interruption, too


def test_names_and_groups_of_the_user(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    run = tiny("run", "logger=wandb", "logger.wandb.mode=online", "max_steps=1")
    out, err = capfd.readouterr()
    assert err == ""
    assert "W&B has no API key; the run is kept offline\n" in out
    assert f"W&B: offline; upload it later with: wandb sync {file_of(run).parent}\n" in out
    assert read_run(file_of(run)).group == "theirs"
    named = tiny("named", "logger=wandb", "max_steps=1", "logger.wandb.group=mine", "logger.wandb.name=my run",
                 "+logger.wandb.id=abc")  # fmt: skip
    record = read_run(file_of(named))
    assert (record.group, record.name, record.id) == ("mine", "my run", "abc")


def test_what_wandb_does_not_take_is_one_line(
    command: Command, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [*TINY, "logger=wandb", f"data.path={corpus}"]
    assert command(*settings, f"hydra.run.dir={tmp_path / 'run'}", "logger.wandb.project=a/b") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: logger.wandb: Invalid project name")
    assert Run.open(tmp_path / "run").info["status"] == "failed"
    assert command(*settings, f"hydra.run.dir={tmp_path / 'other'}", "logger.wandb.mode=of") == 2
    assert capfd.readouterr().err == "error: logger.wandb.mode=of: must be one of auto, online, offline\n"
    assert not (tmp_path / "other").exists()


class Processes:
    """The processes that come from one test, known by a variable of their environment."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def living(self) -> dict[int, str]:
        """Each one's command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended, or is another user's
                if self.mark.encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                        found[int(folder.name)] = command
        return found

    def all_end(self) -> bool:
        """Whether they end by themselves."""
        return wait_for(lambda: not self.living())


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 240) -> bool:
    """Whether a condition comes true in time; shows the output of a process that ends before."""
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
Complete = Callable[..., tuple[str, Run]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run directory of `begin`."""
    return tmp_path / "run"


@pytest.fixture
def begin(processes: Processes, corpus: Path, folder: Path) -> Begin:
    """Begins a real process of the command line, with more overrides and environment variables."""

    def run(*overrides: str, **env: str) -> subprocess.Popen[str]:
        flags = [o for o in overrides if o.startswith("-")]  # which stand before the settings
        place = f"output_dir={folder.parent / 'out'}" if flags else f"hydra.run.dir={folder}"
        settings = [*TINY, "logger=wandb", f"data.path={corpus}", place, *(o for o in overrides if o not in flags)]
        shared = {"PYTHONPATH": str(REPOSITORY), "GPTEXP_TEST": processes.mark}
        return spawn(*flags, *settings, cwd=folder.parent, env=os.environ | shared | env)

    return run


@pytest.fixture
def complete(begin: Begin, processes: Processes, folder: Path) -> Complete:
    """Does the same to the end, which must be a good one; gives what was printed, and the run."""

    def run(*overrides: str, **env: str) -> tuple[str, Run]:
        process = begin(*overrides, **env)
        code, out, err = finish(process)
        assert (code, err) == (0, "")
        assert not processes.living()  # W&B's own process ends before the program
        return out, Run.open(folder)

    return run


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.mark.slow
def test_what_ran_is_recorded(complete: Complete) -> None:
    out, run = complete()
    assert out.count(f"W&B: offline; upload it later with: wandb sync {file_of(run).parent}\n") == 1
    record = read_run(file_of(run))
    assert record.exit_code == 0
    assert record.program == "-m gptexp.train"
    assert record.args[: len(TINY)] == TINY
    assert {"torch", "lightning"} <= record.imported
    check_history(record, run)


@pytest.mark.slow
def test_a_killed_run_stays_unfinished(begin: Begin, processes: Processes, folder: Path) -> None:
    process = begin("log_interval=1", *LONG)
    assert wait_for(lambda: rows(folder) > 300, process)
    process.kill()
    process.communicate()
    assert processes.all_end()
    run = Run.open(folder)
    record = read_run(file_of(run), ended=False)
    assert (record.exit_code, record.id) == (None, run.info["loggers"]["wandb"])
    steps = list(logged(record, "train/loss"))
    assert len(steps) > 30  # all but the last block of the file, which W&B holds back
    assert steps == list(written(run, "train/loss"))[: len(steps)]


@pytest.mark.slow
def test_ctrl_c_ends_the_run_in_wandb(begin: Begin, processes: Processes, folder: Path) -> None:
    """As one that did not reach its end, once what was logged is there."""
    process = begin(*LONG)
    assert wait_for(lambda: rows(folder) > 3, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (130, "")
    assert processes.all_end()
    run = Run.open(folder)
    record = read_run(file_of(run))
    assert (record.exit_code, record.summary["status"]) == (1, '"interrupted"')
    assert list(logged(record, "train/loss")) == [step for step in written(run, "train/loss") if step % 3 == 0]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_while_wandb_waits_for_its_server(
    number: signal.Signals, status: int, begin: Begin, processes: Processes, server: Server, folder: Path
) -> None:
    server.hanging.set()
    process = begin(**server.environment)
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
    process = begin("-m", "seed=1,2", "max_steps=1000", "eval_interval=500")
    found: list[Path] = []

    def training() -> bool:
        found[:] = (tmp_path / "out").glob("sweeps/*/*/metrics.csv")
        return bool(found) and rows(found[0].parent) > 5

    assert wait_for(training, process)
    first = found[0].parent
    (pid,) = (pid for pid, line in processes.living().items() if "wandb-core" in line.partition(" ")[0])
    os.kill(pid, signal.SIGKILL)
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert processes.all_end()
    told = "W&B: its process has ended; the run continues, and keeps its samples and checkpoints only in "
    assert told in (first / "train.log").read_text() + out
    runs = runs_of(first.parent)
    assert {run.info["status"] for run in runs.values()} == {"done"}
    (other,) = (run for run in runs.values() if run.path.name != first.name)
    assert read_run(file_of(runs[first.name]), ended=False).exit_code is None
    record = read_run(file_of(other))
    assert record.exit_code == 0
    check_history(record, other)


@pytest.mark.slow
def test_a_run_online(complete: Complete, server: Server) -> None:
    out, run = complete("logger.wandb.log_model=true", **server.environment)
    identity = run.info["loggers"]["wandb"]
    assert f"W&B: {server.url}/me/gptexp/runs/{identity}\n" in out
    record = read_run(file_of(run))
    record.history = server.history[identity]
    check_history(record, run)
    assert {f"run-{identity}-samples", f"model-{identity}"} <= set(server.artifacts)
    assert "RunResumeStatus" in server.asked  # so that a resumed run continues


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("vanishes", [False, True], ids=["hangs", "vanishes"])
def test_a_server_that_is_lost_costs_no_run(
    vanishes: bool, begin: Begin, processes: Processes, server: Server, folder: Path
) -> None:
    process = begin("max_steps=1000", "eval_interval=200", "sample_tokens=1", **server.environment)
    assert wait_for(lambda: rows(folder) > 70, process)
    server.hanging.set()
    if vanishes:
        server.socket.close()
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert processes.all_end()
    run = Run.open(folder)
    assert run.info["status"] == "done"
    kept = f"the run continues, and keeps its samples and checkpoints only in {folder}"
    assert out.count(f"W&B: no answer within 10 s; {kept}") == 1
    assert f"W&B has not taken everything in time; upload the rest with: wandb sync {file_of(run).parent}\n" in out
    record = read_run(file_of(run))  # which has it all
    assert list(logged(record, "val/loss")) == list(written(run, "val/loss"))
    assert record.exit_code == 0


@pytest.mark.slow
def test_ctrl_c_while_wandb_waits_at_the_end(begin: Begin, processes: Processes, server: Server, folder: Path) -> None:
    process = begin("sample_tokens=0", **server.environment | {"WANDB_FINISH_TIMEOUT": "300"})
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


@pytest.mark.slow
@pytest.mark.parametrize("begun", [more(False), True])
@pytest.mark.parametrize("refuses", [more(False), True], ids=["hangs", "refuses"])
def test_a_server_that_does_not_answer_costs_no_run(
    refuses: bool, begun: bool, complete: Complete, server: Server, tmp_path: Path
) -> None:
    """Nor does it if W&B has begun in this process, which then says so to the programs that it starts."""
    wandb.teardown()  # what an earlier test has begun
    if begun:
        wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)).finish()
    assert ("WANDB_SERVICE" in os.environ) == begun
    server.hanging.set()
    if refuses:
        server.socket.close()
    out, run = complete(**server.environment)
    assert "W&B cannot be reached" in out
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
    with suppress(OSError):  # the other end is closed
        while part := os.read(ours, 1000):
            shown += part
    assert process.wait(60) == 0
    assert b"W&B: offline" in shown
    assert b"wandb: " not in shown


@pytest.mark.slow
def test_an_interrupted_run_is_uploaded_as_one(resumed: Run, server: Server, tmp_path: Path) -> None:
    """By the command that the README gives: its two parts, in the order of time."""
    parts = sorted(resumed.path.glob("wandb/offline-run-*"))
    for part in parts:
        read_run(next(part.glob("run-*.wandb")))
    subprocess.run([Path(sys.executable).with_name("wandb"), "sync", *parts], cwd=tmp_path, check=True, timeout=120,
                   env=os.environ | server.environment, capture_output=True)  # fmt: skip
    sent = server.history[resumed.info["loggers"]["wandb"]]
    assert [row["trainer/global_step"] for row in sent if "val/loss" in row] == [0, 8, 16, 24]
