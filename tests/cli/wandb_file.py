"""Reads a W&B offline run file, independently of the program: LevelDB's log format around protobuf records."""

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Record:
    """What a run file says of its run."""

    id: str = ""
    name: str = ""
    group: str = ""
    project: str = ""
    entity: str = ""
    sweep: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, str] = field(default_factory=dict)  # values as JSON
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, tuple[str, bool]] = field(default_factory=dict)  # (step metric, minimum in the summary)
    summary: dict[str, str] = field(default_factory=dict)  # values as JSON
    artifacts: dict[str, list[str]] = field(default_factory=dict)  # paths of the files, by type and name
    exit_code: int | None = None
    program: str = ""
    args: list[str] = field(default_factory=list)
    imported: set[str] = field(default_factory=set)


def records(path: Path) -> Iterator[bytes]:
    """The log's records: chunks of at most a block, each with a checksum, a length and a type.

    Raises:
        EOFError: after the last whole one, where the file ends in the middle of another.
    """
    data = path.read_bytes()
    at, parts = 7, b""  # a header of seven bytes
    while at < len(data):
        if BLOCK - at % BLOCK < 7:  # a block's last bytes are padding
            at += BLOCK - at % BLOCK
            continue
        if at + 7 > len(data):
            raise EOFError(path)
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        chunk = data[at + 7 : at + 7 + length]
        if len(chunk) < length:
            raise EOFError(path)
        assert checksum == zlib.crc32(chunk, zlib.crc32(bytes([kind])))
        parts += chunk
        at += 7 + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""
    if parts:
        raise EOFError(path)


def read_run(path: Path, ended: bool = True) -> Record:
    """Everything of interest in a run's file; as far as it is written if the run has not ended, or was killed.

    W&B's own process writes the file, and goes on doing so for a moment after the run is over. It ends with the
    process that began it, which waits for it. If that is this process, it ends here.
    """
    if ended:
        wandb.teardown()
    found = Record()
    with suppress(*() if ended else (EOFError,)):
        for content in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            _add(found, record)
    return found


def _add(found: Record, record: Any) -> None:
    match record.WhichOneof("record_type"):
        case "run":
            run = record.run
            found.id, found.name, found.group = run.run_id, run.display_name, run.run_group
            found.entity, found.sweep = run.entity, run.sweep_id
            found.project, found.job_type, found.tags = run.project, run.job_type, list(run.tags)
            found.config |= {u.key or u.nested_key[0]: u.value_json for u in run.config.update}
        case "config":
            found.config |= {u.key or u.nested_key[0]: u.value_json for u in record.config.update}
        case "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            found.history.append(row)
        case "metric":
            found.metrics[record.metric.name] = (record.metric.step_metric, record.metric.summary.min)
        case "summary":
            found.summary |= {u.key or "/".join(u.nested_key): u.value_json for u in record.summary.update}
        case "request" if record.request.WhichOneof("request_type") == "log_artifact":
            found.artifacts |= _artifact(record.request.log_artifact.artifact)
        case "artifact":
            found.artifacts |= _artifact(record.artifact)
        case "environment" if record.environment.program:
            found.program, found.args = record.environment.program, list(record.environment.args)
        case "telemetry":
            found.imported |= {field.name for field, _ in record.telemetry.imports_init.ListFields()}
        case "exit":
            found.exit_code = record.exit.exit_code


def _artifact(record: Any) -> dict[str, list[str]]:
    return {f"{record.type}:{record.name}": sorted(entry.path for entry in record.manifest.contents)}
