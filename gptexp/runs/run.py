"""A run directory as one object: the only code that knows its layout.

config.yaml (fully resolved) · run.json (status, fingerprints, versions, device, times) · metrics.csv ·
result.json · checkpoints/{best,last}.ckpt · samples.txt · train.log · diagnostics.csv
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from gptexp.config.composition import plain
from gptexp.config.schema import Config, flatten, load_config, read_config
from gptexp.config.settings import NEUTRAL, marked, show
from gptexp.errors import UserError
from gptexp.registry import CORPORA, TOKENIZERS, foreign_source

Status = Literal["running", "interrupted", "failed", "done", "diverged", "pruned"]
"""How a run stands; "running" is also what a killed process leaves."""

FINAL: tuple[Status, ...] = ("done", "diverged", "pruned")
"""The statuses of a run that is over."""

COMPUTING = ("data", "inference", "models", "perf", "tasks", "training")  # rooms that results depend on


class Run:
    """One run directory.

    Attributes:
        path: the directory.
        log_path: train.log: what was printed, and the traceback of an error.
        metrics_path: metrics.csv.
        samples_path: samples.txt: the text sampled at each evaluation.
        diagnostics_path: diagnostics.csv: what was measured inside the model.
        heat_maps_path: diagnostics.png: the same, layers by steps.
        curves_path: curves.png: the loss over the steps.
        growing: the files that grow while the run trains, and that a checkpoint counts the bytes of.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log_path, self.metrics_path = path / "train.log", path / "metrics.csv"
        self.samples_path, self.curves_path = path / "samples.txt", path / "curves.png"
        self.diagnostics_path, self.heat_maps_path = path / "diagnostics.csv", path / "diagnostics.png"
        self.growing = [self.metrics_path, self.samples_path, self.diagnostics_path]

    @classmethod
    def claim(
        cls, wanted: Path, config: Config, info: Mapping[str, Any], named: bool = False, tokenizer: str | None = None
    ) -> "Run":
        """Make a new directory for a run of config: `wanted`, or `wanted-2` and so on if that one is taken.

        A directory that the user `named` gets no other name. `info` goes into run.json, and `tokenizer`, if there is
        one, into tokenizer.json, for other software.

        Raises:
            UserError: when the folder cannot be written, or was named and is taken.
        """
        try:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            for number in range(1, 100_000):
                path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
                try:
                    path.mkdir()  # fails if it exists: two processes never share a directory
                    break
                except FileExistsError:
                    if named:
                        resume = f"go on with its run by resume={wanted}, or " if (wanted / "run.json").exists() else ""
                        raise UserError(f"hydra.run.dir={wanted}: is taken; {resume}name another directory") from None
            run = cls(path)
            run.checkpoint("last").parent.mkdir()
            run._write_config(config)
            if tokenizer is not None:
                write_atomically(path / "tokenizer.json", tokenizer.encode())
            run.update(status="running", started=now(), **info)
        except OSError as error:
            raise UserError(f"output_dir={config.output_dir}: cannot write {wanted} ({error.strerror})") from error
        return run

    @classmethod
    def open(cls, path: str | Path, key: str = "run") -> "Run":
        """An existing run directory, named by itself or by one of its checkpoints.

        Raises:
            UserError: when path is neither.
        """
        folder = Path(path)
        if folder.suffix == ".ckpt" and folder.parent.name == "checkpoints":
            folder = folder.parent.parent
        run = cls(folder)
        if not run.path.is_dir():
            raise UserError(f"{key}={path}: there is no such directory")
        if not (run.path / "run.json").is_file() or not (run.path / "config.yaml").is_file():
            raise UserError(f"{key}={path}: is not a run directory (it holds no run.json and config.yaml)")
        try:
            run.info  # noqa: B018  a torn or foreign file is found here, not in the middle of a run
        except ValueError as error:
            raise UserError(f"{key}={path}: run.json is not valid JSON") from error
        return run

    @property
    def config(self) -> Config:
        """The configuration that the run was started with."""
        return load_config(self.path / "config.yaml")

    @property
    def info(self) -> dict[str, Any]:
        """run.json: status, fingerprints, versions, device and times."""
        info = json.loads((self.path / "run.json").read_bytes())
        if not isinstance(info, dict):
            raise ValueError("run.json holds no object")
        return info

    @property
    def fingerprints(self) -> list[str]:
        """Of the configuration, and of those it had before it was extended."""
        info = self.info
        return [info["fingerprints"]["config"], *info.get("earlier", [])]

    def update(self, **changes: Any) -> None:
        """Change entries of run.json."""
        info = self.info if (self.path / "run.json").exists() else {}
        write_atomically(self.path / "run.json", _json(info | changes))

    def finish(self, status: Status, **changes: Any) -> None:
        """Write the final status and the time."""
        self.update(status=status, ended=now(), **changes)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json."""
        write_atomically(self.path / "result.json", _json(result))

    @property
    def result(self) -> dict[str, Any] | None:
        """result.json, or None while there is none."""
        path = self.path / "result.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def checkpoint(self, name: Literal["best", "last"]) -> Path:
        """Path of a checkpoint, whether or not it exists."""
        return self.path / "checkpoints" / f"{name}.ckpt"

    @property
    def sees_later_tokens(self) -> bool:
        """Whether the training loss of this variant sees what it is to predict, as batch norm's does."""
        return bool(self.info.get("train_loss", {}).get("sees_later_tokens"))

    def check_resumable(self, requested: Mapping[str, Any]) -> Config:
        """The configuration to continue with: the run's own, but for more steps and for what changes no result.

        Args:
            requested: the settings that the command names, by dotted key.

        Raises:
            UserError: when the run is done, other settings differ, or the schedule depends on the number of steps.
        """
        config = self.config
        own, before = flatten(config.tree()), config.max_steps or 0
        steps = requested.get("max_steps") or before
        longer = config.max_seconds is None and steps > before
        free = [key for key in marked(Config, NEUTRAL) if key != "logger"]  # a run's loggers go on with it
        if longer:
            free += ["max_steps", "schedule."]
        asked = {k: v for k, v in requested.items() if own.get(k) != v}
        if wrong := [k for k in asked if not k.startswith(tuple(free))]:
            raise UserError(
                f"resume={self.path}: {k}={show(asked[k])} differs from the run's {k}={show(own.get(k))}; "
                "leave it out, or start a new run" for k in wrong
            )
        if not longer and self.info.get("status") == "done":
            more = "" if config.max_seconds is not None else f"; max_steps above {before} trains it on"
            raise UserError(f"resume={self.path}: this run is done{more}")
        tree, schedule = config.tree(), config.schedule
        named = {k.removeprefix("schedule."): v for k, v in requested.items() if k.startswith("schedule.")}
        if named.get("name", schedule.name) != schedule.name:
            tree["schedule"] = named
        elif longer and not named and len({schedule.factor(before - 1, n) for n in (before, steps)}) > 1:
            raise UserError(
                f"resume={self.path}: max_steps={steps}: schedule.name={schedule.name} has brought the learning rate "
                f"down over {before} steps; name the schedule to go on with, such as schedule=constant"
            )
        changed = OmegaConf.create(tree)
        for key, value in asked.items():
            OmegaConf.update(changed, key, value, force_add=True)
        return read_config(plain(changed))

    def extend(self, config: Config) -> None:
        """Continue with another configuration; run.json keeps the fingerprints of those before."""
        if config == self.config:
            return
        earlier = [known for known in self.fingerprints if known != config.fingerprint()]
        self._write_config(config)
        self.update(earlier=earlier, fingerprints=self.info["fingerprints"] | {"config": config.fingerprint()})

    def _write_config(self, config: Config) -> None:
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config.tree(), sort_keys=False).encode())

    def lock(self, timeout: float = 0) -> AbstractContextManager[Any]:
        """Hold the run for this process, while the result is entered; the system frees it if the process dies.

        Raises:
            UserError: when another process trains this run and does not free it within `timeout` seconds.
        """
        try:
            return FileLock(self.path / ".lock", timeout=timeout).acquire()
        except Timeout as error:
            raise UserError(f"resume={self.path}: another process is training this run") from error


def code_fingerprint(config: Config) -> str:
    """SHA-256 over the source files that results depend on, those of other packages' components included."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for room in COMPUTING for path in (package / room).rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    data = (CORPORA[config.data.name].made, TOKENIZERS[config.data.tokenizer].made)
    used = [*config.model.components, type(config.optimizer), type(config.schedule), type(config.task), *data]
    for source in sorted({foreign_source(component) for component in used}):
        digest.update(source.encode())
    return digest.hexdigest()


def checkpoint_named(path: str | Path) -> Literal["best", "last"]:
    """The checkpoint that a path is of; "best" where it is a run directory."""
    return "last" if Path(path).name == "last.ckpt" else "best"


def unfinished(folder: Path, fingerprint: str) -> Run | None:
    """The newest run under folder of this configuration's fingerprint that is neither at its end nor being trained."""
    found = []
    for path in folder.rglob("run.json") if folder.is_dir() else ():
        try:
            info = json.loads(path.read_bytes())
            if info["fingerprints"]["config"] == fingerprint and info["status"] not in FINAL:
                found.append((info["started"], path.parent))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for _, path in sorted(found, reverse=True):
        with suppress(UserError), Run(path).lock():
            return Run(path)
    return None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
