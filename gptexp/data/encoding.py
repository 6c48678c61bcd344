"""A corpus as an array of ids on disk: made once in bounded memory, then memory-mapped.

The cache entry of a corpus is a folder with `ids.bin` (the ids, in the machine's byte order) and `entry.json` (the
tokenizer). Its name is a hash of everything that determines the ids, so it never goes out of date.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptexp.config.sections import DataConfig, TaskConfig
from gptexp.data.cache import cache_folder, locked, replacing
from gptexp.data.corpora import Corpus, find_corpus
from gptexp.data.files import Part, read_text
from gptexp.data.tokenizers import Tokenizer, tokenizer_from_dict
from gptexp.errors import UserError
from gptexp.registry import CORPORA, TASKS, TOKENIZERS, foreign_source

CHUNK = 2**16  # bytes; with larger chunks numpy's arrays outgrow the processor's cache
FORMAT = 2  # of the cache entry; raise it when the same corpus would be written differently


@dataclass(frozen=True, eq=False)
class Encoded:
    """The ids of a whole corpus."""

    ids: NDArray[Any]  # (n,) of the tokenizer's `dtype`; a read-only map of a file
    tokenizer: Tokenizer  # what the ids mean
    fingerprint: str  # SHA-256 of corpus, tokenizer and terminator; equal for equal data alone
    val_start: int | None = None  # where the validation split begins, if it is a text of its own


@dataclass(frozen=True)
class Reading:
    """A corpus, found and encoded."""

    corpus: Corpus  # the one asked for, or its fallback
    encoded: Encoded  # its ids
    data: DataConfig  # the settings that give these ids
    task: TaskConfig  # the one asked for, or the default task of the fallback


def read_corpus(data: DataConfig, task: TaskConfig) -> Reading:
    """Find the corpus that the settings ask for, or its fallback, and encode it.

    Raises:
        UserError: see `find_corpus` and `encode_corpus`.
    """
    corpus = find_corpus(data)
    if corpus.name != data.name:
        data = replace(data, name=corpus.name)
        task = TASKS.settings(CORPORA[corpus.name].made.task)
    encoded = task.encode(corpus, data) or encode_corpus(corpus, data.tokenizer, task.document_end(data))
    return Reading(corpus, encoded, data, task)


def encode_corpus(
    corpus: Corpus, tokenizer: str = "char", terminator: str | None = None, *, chunk_bytes: int = CHUNK
) -> Encoded:
    """The ids of `corpus`, from the cache, or encoded into it. Line ends are not changed.

    Args:
        corpus: the text.
        tokenizer: the registered name.
        terminator: of its documents, if it has any; see `Tokenizer.learn`.
        chunk_bytes: how much of the file to read at a time; it does not change the result.

    Raises:
        UserError: text that is not UTF-8, is empty, or contains the terminator; a cache that cannot be written.
    """
    key = _sha256_of(format=FORMAT, byteorder=sys.byteorder, corpus=corpus.sha256, tokenizer=tokenizer,
                     source=foreign_source(TOKENIZERS[tokenizer].made), terminator=terminator)  # fmt: skip
    folder = cache_folder() / "encoded" / key
    found = _read(folder, key, corpus, terminator)  # without the lock: a read-only cache is enough
    if found is None:
        with locked(folder):
            found = _read(folder, key, corpus, terminator)  # another process may have made it meanwhile
            if found is None:
                folder.mkdir(exist_ok=True)
                _build(folder, key, corpus, tokenizer, terminator, chunk_bytes)
                found = _read(folder, key, corpus, terminator)
    if found is None:
        raise UserError(f"GPTEXP_CACHE={cache_folder()}: {folder.name} is not as it was written; allowed: another disk")
    return found


def _build(folder: Path, key: str, corpus: Corpus, kind: str, terminator: str | None, chunk_bytes: int) -> None:
    """Write the entry, the ids first, so that a description never exists without its ids."""
    parts = corpus.parts
    tokenizer: Tokenizer = TOKENIZERS[kind].made.learn(lambda: _texts(corpus, parts, chunk_bytes), terminator)
    cut = len(parts) - corpus.val_files
    with replacing(folder / "ids.bin") as file:
        ends = []
        for some in (parts[:cut], parts[cut:]):
            for text in _texts(corpus, some, chunk_bytes):
                file.write(tokenizer.packed(text))
            ends.append(file.tell() // tokenizer.dtype.itemsize)
    entry = {"key": key, "n": ends[1], "tokenizer": tokenizer.to_dict()}
    with replacing(folder / "entry.json") as file:
        file.write(json.dumps(entry | ({"val_start": ends[0]} if corpus.val_files else {})).encode())


def _read(folder: Path, key: str, corpus: Corpus, terminator: str | None) -> Encoded | None:
    """The entry, or None if it is missing, cut short or does not match its name."""
    try:
        entry = json.loads((folder / "entry.json").read_bytes())
        tokenizer = tokenizer_from_dict(entry["tokenizer"])
        ids: NDArray[Any] = np.memmap(folder / "ids.bin", tokenizer.dtype, mode="r")
        if (entry["key"], entry["n"]) != (key, len(ids)):
            return None
    except (OSError, ValueError, TypeError, KeyError, UserError):
        return None
    fingerprint = _sha256_of(corpus=corpus.sha256, tokenizer=tokenizer.to_dict(), documents=terminator is not None)
    return Encoded(ids, tokenizer, fingerprint, entry.get("val_start"))


def _texts(corpus: Corpus, parts: Iterable[Part], chunk_bytes: int) -> Iterator[str]:
    """The text of some of the files in pieces; where there are several, each ends with a newline.

    Raises:
        UserError: see `gptexp.data.files.read_text`.
    """
    for part in parts:
        last = "\n"
        for text in read_text(part, corpus.field, chunk_bytes):
            yield text
            last = text or last
        if not last.endswith("\n") and len(corpus.parts) > 1:
            yield "\n"


def _sha256_of(**parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
