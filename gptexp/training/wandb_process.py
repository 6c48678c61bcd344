"""W&B in a process of its own, which gets ready while this one imports torch; imports neither.

Importing `wandb` and beginning a run takes as long as importing torch, and Python lets only one thread of a process
do such a thing at a time. So another process does it and gets what is to be logged, in order, as lines of JSON:

    to it      begin, log, samples, summary, finish          [kind, content]
    from it    message (of the program's log), opened, finished, error

It serves all runs of this process, one after the other, and ends with it, however that ends. A run that this process
did not finish then stays as it is, as if W&B had been in the process that was killed.
"""

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from gptexp.config import Config
from gptexp.training.settings import WandbConfig

log = logging.getLogger("gptexp")

PATIENCE = 30  # seconds for W&B to end with this process

DEFINITIONS: dict[str, dict[str, Any]] = {
    "step": {},
    "tokens": {},
    "*": {"step_metric": "step"},
    **{f"val/{name}": {"step_metric": "step", "summary": "min,last"} for name in ("loss", "perplexity", "bpc")},
    "val/accuracy": {"step_metric": "step", "summary": "max,last"},
}
"""What W&B is told of metrics: what they are drawn over, and which of their values counts."""


class WandbProcess:
    """The process, as this one sees it."""

    def __init__(self) -> None:
        # What is printed while packages are imported goes where errors go, not among the answers.
        program = ("import os, sys; out = os.dup(1); os.dup2(2, 1); "
                   f"sys.path[:] = {sys.path!r}; from {__name__} import main; main(out)")  # fmt: skip
        # In a session of its own, it does not get the terminal's Ctrl-C.
        self._process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, start_new_session=True)  # fmt: skip
        self._parent = os.getpid()
        self._answers: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._lost = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        atexit.register(self.close)

    @property
    def usable(self) -> bool:
        """Whether it can take another run."""
        return not self._lost and self._process.poll() is None and self._parent == os.getpid()

    def send(self, kind: str, content: Any = None) -> None:
        """Tell it something; it may still be at work on what it was told before.

        Raises:
            RuntimeError: when something before this has failed; a subclass of W&B's own error's name.
        """
        while not self._answers.empty():
            self._understood(*self._answers.get())
        assert self._process.stdin is not None
        line = json.dumps([kind, content]).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            self.await_answer("")  # that it has ended
        except BaseException:  # Ctrl-C, in the middle of the line perhaps
            self.kill()
            raise

    def await_answer(self, kind: str, patience: float | None = None) -> None:
        """Wait until it is so far; after `patience` seconds, or at Ctrl-C, end it instead.

        Raises:
            RuntimeError: as `send`.
        """
        try:
            with _ctrl_c_at_once():
                while self._understood(*self._answers.get(timeout=patience)) != kind:
                    pass
        except Empty:
            self.kill()
        except KeyboardInterrupt:
            self.kill()
            raise

    def kill(self) -> None:
        """End it at once."""
        self._lost = True
        self._process.kill()

    def close(self) -> None:
        """Let it end, with this process."""
        if self._parent != os.getpid():  # in a process that was forked from this one
            return
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.kill()
        self._listener.join()

    def _understood(self, kind: str, content: Any) -> str:
        if kind == "error":
            error = type(content["type"], (RuntimeError,), {})(content["text"])
            error.add_note(content["traceback"])
            raise error
        return kind

    def _listen(self) -> None:
        assert self._process.stdout is not None
        text = "W&B's process gave an answer that is none"
        with suppress(ValueError, TypeError):
            for line in self._process.stdout:
                kind, content = json.loads(line)
                if kind == "message":
                    log.log(*content)
                else:
                    self._answers.put((kind, content))
            text = f"W&B's process has ended with status {self._process.wait()}"
        self._lost = True
        self._answers.put(("error", {"type": "RuntimeError", "text": text, "traceback": ""}))


@contextmanager
def _ctrl_c_at_once() -> Iterator[None]:
    """In here Ctrl-C need not wait for the end of a training step."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


_running: WandbProcess | None = None


def wandb_process() -> WandbProcess:
    """This process's own, begun if need be."""
    global _running  # noqa: PLW0603
    if _running is None or not _running.usable:
        _running = WandbProcess()
    return _running


def prepare(config: Config) -> None:
    """Begin W&B's process already, if the run is going to need it."""
    if isinstance(config.logger, WandbConfig):
        with suppress(OSError):  # which the run itself will tell
            wandb_process()


def request(settings: WandbConfig, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What the process has to know to begin a run as if it were this process.

    Args:
        settings: the logger's.
        folder: the run's directory.
        options: of `wandb.init`.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    program = f"-m {spec.name}" if spec else getattr(main, "__file__", None)  # as W&B has it
    return {
        "settings": asdict(settings), "folder": str(folder), "options": options, "pid": os.getpid(), "argv": sys.argv,
        "cwd": os.getcwd(), "env": ({"WANDB_PROGRAM": program} if program else {}) | dict(os.environ),
        "imported": sorted({name.partition(".")[0] for name in sys.modules}),
    }  # fmt: skip


class _Messages(logging.Handler):
    """Hands what is logged to the process that this one works for."""

    def __init__(self, out: IO[bytes]) -> None:
        super().__init__()
        self.out = out

    def emit(self, record: logging.LogRecord) -> None:
        _tell(self.out, "message", [record.levelno, "%s", record.getMessage()])


def _tell(out: IO[bytes], kind: str, content: Any = None) -> None:
    out.write(json.dumps([kind, content]).encode() + b"\n")
    out.flush()


def _begin(told: dict[str, Any]) -> Any:
    """Begin a W&B run that says of program and machine what it would say in the process that asks for it."""
    from gptexp.tracking import open_wandb

    os.environ.clear()
    os.environ.update(told["env"])
    os.chdir(told["cwd"])
    sys.argv[:] = told["argv"]
    run = open_wandb(WandbConfig(**told["settings"]), Path(told["folder"]), pid=told["pid"], **told["options"])
    with suppress(Exception):  # what W&B notes of other packages, by a name that may change
        from wandb.sdk.lib.telemetry import context

        with context(run=run) as noted:
            for name in {field.name for field in noted.imports_init.DESCRIPTOR.fields} & set(told["imported"]):
                setattr(noted.imports_init, name, True)
                setattr(noted.imports_finish, name, True)
    for name, how in DEFINITIONS.items():
        run.define_metric(name, **how)
    return run


def _serve(lines: Iterable[bytes], out: IO[bytes]) -> Any:
    """Do what is asked, to the end of the lines; returns the run that is then left unfinished."""
    run: Any = None
    for line in lines:
        kind, content = json.loads(line)
        try:
            match kind:
                case "begin":
                    run = _begin(content)
                    _tell(out, "opened")
                case "log":
                    run.log(content)
                case "samples":
                    import wandb

                    step, rows = content
                    table = wandb.Table(columns=["step", "text"], data=rows)
                    run.log({"samples": table, "step": step, "trainer/global_step": step})
                case "summary":
                    run.summary.update(content)
                case "finish":
                    run.finish(exit_code=content)
                    run = None
                    _tell(out, "finished")
        except Exception as error:
            told = {"type": type(error).__name__, "text": str(error), "traceback": traceback.format_exc()}
            _tell(out, "error", told)
    return run


def main(answers: int) -> None:
    """Serve the process that has begun this one.

    Args:
        answers: the file descriptor that it reads.
    """
    from gptexp.console import importing

    lines, out = os.fdopen(os.dup(0), "rb"), os.fdopen(answers, "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # W&B's own processes have no business with either
    log.handlers, log.propagate = [_Messages(out)], False
    log.setLevel(logging.DEBUG)
    with importing():
        import wandb  # noqa: F401
    unfinished = _serve(lines, out)
    if unfinished is not None:
        os._exit(1)  # before W&B calls it finished
