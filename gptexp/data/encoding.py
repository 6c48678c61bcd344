"""A corpus as an array of ids on disk: made once in bounded memory, then memory-mapped.

The cache entry of a corpus is a folder with `ids.bin` (the ids, in the machine's byte order) and `entry.json` (the
tokenizer). Its name is a hash of everything that determines the ids, so it never goes out of date.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptexp.config.sections import DataConfig, TaskConfig
from gptexp.data.cache import cache_folder, locked, replacing
from gptexp.data.corpora import Corpus, find_corpus
from gptexp.data.files import Part, read_text
from gptexp.data.tokenizers import Tokenizer, learn_tokenizer, tokenizer_from_dict
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
    val_start: int | None = None  # where the validation split begins, if it is the end of the ids and known so far


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
    encoded = task.encode(corpus, data) or encode_corpus(corpus, data, task)
    return Reading(corpus, encoded, data, task)


def encode_corpus(
    corpus: Corpus, data: DataConfig | None = None, task: TaskConfig | None = None, *, chunk_bytes: int = CHUNK
) -> Encoded:
    """The ids of `corpus`, from the cache, or encoded into it. Line ends are not changed.

    Args:
        corpus: the text.
        data: says the tokenizer, and how much is held out; None is the default.
        task: says what ends a document, and what is held out; None is running text.
        chunk_bytes: how much of the file to read at a time; it does not change the result.

    Raises:
        UserError: text that is not UTF-8, is empty, or contains the terminator; a cache that cannot be written.
    """
    data, task = data or DataConfig(), task or TASKS.settings()
    made, terminator = TOKENIZERS[data.tokenizer].made, task.document_end(data)
    key = _sha256_of(format=FORMAT, byteorder=sys.byteorder, corpus=corpus.sha256, tokenizer=data.tokenizer,
                     source=foreign_source(made), terminator=terminator,
                     learned_from=None if made.one_per_character else _learned_from(data, task))  # fmt: skip
    folder = cache_folder() / "encoded" / key
    found = _read(folder, key, corpus, terminator)  # without the lock: a read-only cache is enough
    if found is None:
        with locked(folder):
            found = _read(folder, key, corpus, terminator)  # another process may have made it meanwhile
            if found is None:
                folder.mkdir(exist_ok=True)
                _build(folder, key, terminator, partial(_pieces, corpus, data, task, chunk_bytes), data)
                found = _read(folder, key, corpus, terminator)
    if found is None:
        raise UserError(f"GPTEXP_CACHE={cache_folder()}: {folder.name} is not as it was written; allowed: another disk")
    return found


def _build(
    folder: Path, key: str, terminator: str | None, pieces: Callable[[], Iterator[tuple[str, bool]]], data: DataConfig
) -> None:
    """Write the entry, the ids first, so that a description never exists without its ids."""
    every = TOKENIZERS[data.tokenizer].made.one_per_character
    tokenizer = learn_tokenizer(data, lambda: (text for text, held in pieces() if every or not held), terminator)
    width, parts = tokenizer.dtype.itemsize, list[tuple[bool, int]]()  # whether each is held out, where it begins
    with replacing(folder / "ids.bin") as file:
        for held, some in groupby(pieces(), itemgetter(1)):
            parts.append((held, file.tell() // width))
            for text in tokenizer.pieces(text for text, _ in some):
                file.write(tokenizer.packed(text))
        n = file.tell() // width
    entry = {"key": key, "n": n, "tokenizer": tokenizer.to_dict()}
    if [held for held, _ in parts] == [False, True]:
        entry["val_start"] = parts[1][1]
    with replacing(folder / "entry.json") as file:
        file.write(json.dumps(entry).encode())


def _learned_from(data: DataConfig, task: TaskConfig) -> list[object]:
    """What decides which text a tokenizer learns from, and what it learns, beside the corpus."""
    size = data.vocab_size if TOKENIZERS[data.tokenizer].made.sized else None
    return [size, data.val_fraction, asdict(task), foreign_source(type(task))]


def _pieces(corpus: Corpus, data: DataConfig, task: TaskConfig, chunk_bytes: int) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is held out, as far as that must be known."""
    if corpus.val_files or TOKENIZERS[data.tokenizer].made.one_per_character:
        cut = len(corpus.parts) - corpus.val_files
        for held, some in ((False, corpus.parts[:cut]), (True, corpus.parts[cut:])):
            yield from ((text, held) for text in _texts(corpus, some, chunk_bytes))
    else:
        yield from task.held_out(lambda: _texts(corpus, corpus.parts, chunk_bytes), data)


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
