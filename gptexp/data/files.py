"""A user's own text: a file, a folder or a pattern of files, some of them compressed or JSON lines."""

import gzip
import hashlib
import io
import json
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

from gptexp.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
"""Of the files of a folder that are read, each also with .gz; a file that is named may have any."""


class Part(NamedTuple):
    """A file of a corpus."""

    path: Path
    sha256: str  # of its bytes, in hexadecimal


def is_json(path: Path) -> bool:
    """Whether each line of a file is a JSON object."""
    return path.name.removesuffix(".gz").endswith(".jsonl")


def find_parts(given: str, key: str) -> list[Part]:
    """The files that a path names, in the order of their names.

    Args:
        given: a file, a folder or a pattern such as "notes/**/*.md".
        key: the setting, for messages.

    Raises:
        UserError: when there is none, or one is empty or cannot be read.
    """
    path = Path(given).expanduser().absolute()
    what = "allowed: a UTF-8 text file that is not empty, or a folder or pattern of them"
    try:
        if path.is_dir():
            paths = sorted(p for p in path.rglob("*") if p.name.removesuffix(".gz").endswith(SUFFIXES)
                           and not any(name.startswith(".") for name in p.relative_to(path).parts))  # fmt: skip
            problem = f"holds no file that is not empty and ends with {', '.join(SUFFIXES)}, or with .gz after that"
        elif has_magic(given) and not path.exists():
            paths, problem = sorted(map(Path, glob(str(path), recursive=True))), "no file has such a name"
        else:
            paths, problem = [path], "empty" if path.is_file() else "not a file" if path.exists() else "no such file"
        parts = [Part(p, sha256_of(p)) for p in paths if p.is_file() and p.stat().st_size]
    except OSError as error:
        parts, problem = [], f"cannot be read ({error.strerror})"
    if not parts:
        raise UserError(f"{key}={given}: {problem}; {what}")
    return parts


def read_text(part: Part, field: str, chunk_bytes: int) -> Iterator[str]:
    """The text of a file in pieces; of a file of JSON lines, that of a key of each line, with a newline after it.

    Raises:
        UserError: a file that cannot be read, has changed, is not UTF-8, or has a line without that text.
    """
    if is_json(part.path):
        for number, entry in json_lines(part):
            text = entry.get(field) if isinstance(entry, dict) else None
            if not isinstance(text, str):
                raise UserError(f'data.path={part.path}: line {number} has no text "{field}"; allowed: the name of '
                                "another key, as data.field=KEY")  # fmt: skip
            yield f"{text}\n"
        return
    decoder, offset = getincrementaldecoder("utf-8")(), 0  # of the end of the chunk in the text
    with _opened(part) as file:
        try:
            while chunk := file.read(chunk_bytes):
                offset += len(chunk)
                yield decoder.decode(chunk)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:  # its object begins with the rest of the previous chunk
            at = offset - len(error.object) + error.start
            raise UserError(f"data.path={part.path}: not UTF-8, byte 0x{error.object[error.start]:02x} at offset {at}; "
                            "allowed: a UTF-8 text file") from error  # fmt: skip


def lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes in pieces, each with its newline; the last one may have none."""
    begun: list[str] = []
    for text in texts:
        first, *others = text.split("\n")
        begun.append(first)
        for other in others:
            yield "".join([*begun, "\n"])
            begun = [other]
    if last := "".join(begun):
        yield last


def json_lines(part: Part) -> Iterator[tuple[int, Any]]:
    """The values of a file's lines, each with the number of the line.

    Raises:
        UserError: for a line that is not JSON; see `read_text` for others.
    """
    with _opened(part) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, json.loads(line)
            except ValueError as error:
                what = "is not JSON" if line.strip() else "is empty"
                raise UserError(f"data.path={part.path}: line {number} {what}; allowed: a JSON object in each "
                                "line") from error  # fmt: skip


@contextmanager
def _opened(part: Part) -> Iterator[Any]:
    """A file's bytes, decompressed, to be read to the end; they must be those that were found."""
    try:
        with open(part.path, "rb", buffering=0) as file:
            raw = _Digest(file)
            buffered = io.BufferedReader(raw, 2**16)
            yield gzip.GzipFile(fileobj=buffered) if part.path.suffix == ".gz" else buffered
    except EOFError as error:
        raise UserError(f"data.path={part.path}: ends too early; allowed: a whole gzip file") from error
    except OSError as error:  # also of gzip
        raise UserError(f"data.path={part.path}: cannot be read ({error.strerror or error})") from error
    if raw.digest.hexdigest() != part.sha256:
        raise UserError(f"data.path={part.path}: changed while it was being read; allowed: a file nobody writes to")


class _Digest(io.RawIOBase):
    """Reads a file, and digests what it reads."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return int(count)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
