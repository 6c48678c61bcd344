"""W&B runs in a process of its own: what it records, and how it ends with the run, in real processes."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptexp.records import read_metrics, read_samples
from gptexp.runs import Run
from tests.cli.wandb_file import read_run, read_so_far
from tests.conftest import REPOSITORY, TINY, finish, runs_of, spawn

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")

LONG = ["max_steps=100000", "eval_interval=100000", "checkpoint_interval=50", "eval_windows=2"]

Begin = Callable[..., subprocess.Popen[str]]


class Processes:
    """The processes that come from one test, known by a variable of their environment."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def living(self) -> dict[int, tuple[int, str]]:
        """Each one's parent and command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                    if state != "Z":
                        found[int(folder.name)] = int(parent), command
            except OSError:  # it has just ended, or is another user's
                continue
        return found

    def wandb(self) -> list[int]:
        """The process that serves the run; not a copy of it that is about to become another program."""
        found = {pid: parent for pid, (parent, command) in self.living().items() if "wandb_process" in command}
        return [pid for pid, parent in found.items() if parent not in found]

    def all_end(self) -> bool:
        """Whether they end by themselves."""
        return wait_for(lambda: not self.living())


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def rows(folder: Path) -> int:
    path = folder / "metrics.csv"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


@pytest.fixture
def processes() -> Iterator[Processes]:
    found = Processes()
    yield found
    for pid in found.living():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def begin(processes: Processes, corpus: Path, tmp_path: Path) -> Begin:
    def run(*overrides: str, **env: str) -> subprocess.Popen[str]:
        settings = [*TINY, "logger=wandb", f"data.path={corpus}", *overrides]
        shared = {"PYTHONPATH": str(REPOSITORY), "GPTEXP_TEST": processes.mark}
        return spawn(*settings, cwd=tmp_path, env=os.environ | shared | env)

    return run


@pytest.fixture
def silent() -> Iterator[dict[str, str]]:
    """The environment in which W&B's server takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        yield {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": url, "WANDB_INIT_TIMEOUT": "5"}


def test_it_records_what_the_program_itself_would(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin(f"hydra.run.dir={folder}")
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert processes.all_end()
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert out.count(f"W&B: offline; upload it later with: wandb sync {file.parent}\n") == 1
    record = read_run(file)
    assert record.exit_code == 0
    assert record.program == "-m gptexp.train"
    assert record.args == process.args[3:]  # type: ignore[index]
    assert {"torch", "hydra", "lightning"} <= record.imported
    written = [{k: v for k, v in row.items() if k != "step"} for row in read_metrics(folder / "metrics.csv")]
    logged = [row for row in record.history if "samples/path" not in row]
    assert [row["trainer/global_step"] for row in logged] == [row["step"] for row in logged]
    assert [{k: v for k, v in row.items() if k in written[i]} for i, row in enumerate(logged)] == written
    assert len([row for row in record.history if "samples/path" in row]) == len(read_samples(folder / "samples.txt"))
    assert record.summary["status"] == '"done"'


def test_two_jobs_in_one_process(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    process = begin("-m", "seed=1,2", f"output_dir={tmp_path / 'out'}")
    served: set[int] = set()
    while process.poll() is None:
        served |= set(processes.wandb())
        time.sleep(0.01)
    code, _, err = finish(process)
    assert (code, err) == (0, "")
    assert len(served) == 1
    assert processes.all_end()
    (sweep,) = (tmp_path / "out" / "sweeps").iterdir()
    runs = runs_of(sweep)
    assert len(runs) == 2
    for name, run in runs.items():
        (file,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
        record = read_run(file)
        assert (record.name, record.id, record.exit_code) == (name, run.info["wandb_id"], 0)
        losses = [row["val/loss"] for row in record.history if "val/loss" in row]
        assert losses == [row["val/loss"] for row in read_metrics(run.metrics_path) if "val/loss" in row]


@pytest.mark.slow
def test_jobs_side_by_side(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    code, _, err = finish(begin("-m", "seed=1,2,3,4", f"output_dir={tmp_path / 'out'}", *launcher))
    assert code == 0, err
    assert processes.all_end()
    (sweep,) = (tmp_path / "out" / "sweeps").iterdir()
    runs = runs_of(sweep)
    assert len(runs) == 4
    for name, run in runs.items():
        (file,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
        record = read_run(file)
        assert (record.name, record.group, record.exit_code) == (name, sweep.name, 0)


@pytest.mark.slow
def test_processes_that_train_together(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, _, err = finish(begin("hardware=ddp_cpu", f"hydra.run.dir={folder}"))
    assert code == 0, err
    assert processes.all_end()
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    record = read_run(file)
    assert record.exit_code == 0
    assert [r["step"] for r in record.history if "val/loss" in r] == [0, 8, 16, 24]


def test_a_killed_run_stays_unfinished(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin(f"hydra.run.dir={folder}", "log_interval=1", *LONG)
    assert wait_for(lambda: rows(folder) > 300)
    process.kill()
    process.communicate()
    assert processes.all_end()
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    record = read_so_far(file)
    assert record.exit_code is None
    assert record.id == Run.open(folder).info["wandb_id"]
    logged = [row["step"] for row in record.history if "samples/path" not in row]
    assert len(logged) > 30  # all but the last block of the file, which W&B holds back
    assert logged == [row["step"] for row in read_metrics(folder / "metrics.csv")][: len(logged)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_while_torch_is_imported(
    number: signal.Signals, status: int, begin: Begin, processes: Processes, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = begin(f"hydra.run.dir={folder}")
    assert wait_for(processes.wandb)
    process.send_signal(number)
    code, _, err = finish(process)
    assert (code, err) == (status, "")
    assert processes.all_end()
    assert not (folder / "wandb").exists()


def test_ctrl_c_while_wandb_waits_for_its_server(
    begin: Begin, processes: Processes, silent: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = begin(f"hydra.run.dir={folder}", **silent)
    assert wait_for(lambda: rows(folder) == 1)  # the untrained model is evaluated; the row waits for W&B
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130
    assert "Traceback" not in err
    assert "W&B" not in out  # neither that it was reached nor that it was not
    assert processes.all_end()
    assert Run.open(folder).info["status"] == "interrupted"
    assert rows(folder) == 1


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
@pytest.mark.parametrize("served", [False, True], indirect=True)
def test_a_server_that_does_not_answer_costs_no_run(
    begin: Begin, processes: Processes, silent: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    code, out, err = finish(begin(f"hydra.run.dir={folder}", **silent))
    assert code == 0, err + (folder / "train.log").read_text()
    assert "W&B cannot be reached" in out
    assert processes.all_end()
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert f"wandb sync {file.parent}\n" in out
    assert read_run(file).history[-1]["step"] == 24


def test_an_error_of_wandb_is_one_line(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, _, err = finish(begin(f"hydra.run.dir={folder}", "logger.project=a/b"))
    assert code == 1
    assert err.startswith("error: UsageError: Invalid project name")
    assert err.endswith(f"; traceback in {folder}/train.log\n")
    assert len(err.splitlines()) == 1
    assert processes.all_end()
    assert Run.open(folder).info["status"] == "failed"
    assert "wandb.init(" in (folder / "train.log").read_text()  # where it happened


def test_a_run_whose_wandb_is_killed_says_so_and_goes_on(begin: Begin, processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin(f"hydra.run.dir={folder}", *LONG)
    assert wait_for(lambda: rows(folder) > 30)
    (pid,) = processes.wandb()
    os.kill(pid, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1
    assert err == f"error: RuntimeError: W&B's process has ended with status -9; traceback in {folder}/train.log\n"
    assert processes.all_end()
    run = Run.open(folder)
    assert run.info["status"] == "failed"
    assert run.checkpoint("last").exists()


def test_a_run_that_fails_is_told_to_wandb(begin: Begin, tmp_path: Path, processes: Processes) -> None:
    """Ctrl-C, too, ends the run in W&B, as one that did not reach its end."""
    folder = tmp_path / "run"
    process = begin(f"hydra.run.dir={folder}", *LONG)
    assert wait_for(lambda: rows(folder) > 3)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (130, "")
    assert processes.all_end()
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    record = read_run(file)
    assert (record.exit_code, record.summary["status"]) == (1, '"interrupted"')
    last = [row["step"] for row in record.history if "train/loss" in row][-1]
    assert last == read_metrics(folder / "metrics.csv")[-1]["step"]


def test_what_a_package_prints_there_is_no_answer(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "chatty.py").write_text("import sys\nprint('hello ' * 100)\nprint('[1', end='', flush=True)\n")
    env = os.environ | {"GPTEXP_IMPORT": "chatty", "PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline"}
    settings = [s for s in TINY if s != "logger=none"]
    process = spawn(*settings, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path, env=env)
    code, _, err = finish(process)
    assert (code, err.replace("hello ", "").strip()) == (0, "[1")
    assert Run.open(tmp_path / "run").info["status"] == "done"
    assert list(tmp_path.glob("run/wandb/offline-run-*/run-*.wandb"))


def test_python_finds_the_same_modules_there(tmp_path: Path) -> None:
    """Also where this process was started from another folder's path."""
    program = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from gptexp.training.wandb_process import wandb_process
process = wandb_process()
process.send("begin", {{}})
try:
    process.await_answer("opened")
except RuntimeError as error:
    print(type(error).__name__, error)
print(process.usable, wandb_process() is process)
process.kill()
print(process.usable, wandb_process() is process)
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True,
                         check=True).stdout  # fmt: skip
    assert out.splitlines() == ["KeyError 'env'", "True True", "False False"]
