"""A corpus as an array of ids on disk: made once in bounded memory, then mapped.

The entry of a corpus in the cache is a folder with `ids.bin` (the ids, in the machine's byte order) and
`entry.json` (what they are). It is named after all that determines the ids, so it never goes out of date.
"""

import hashlib
import json
import sys
from codecs import getincrementaldecoder
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptexp.data.cache import cache_folder, locked, replacing
from gptexp.data.corpora import Corpus
from gptexp.data.settings import DataConfig
from gptexp.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, code_points, tokenizer_from_dict
from gptexp.errors import UserError

CHUNK = 2**16  # bytes; larger ones are slower, as what numpy makes of them outgrows the processor's cache
FORMAT = 1  # of the cache entry; to be raised whenever the same corpus would be written otherwise


@dataclass(frozen=True, eq=False)
class Encoded:
    """The ids of a whole corpus."""

    ids: NDArray[Any]  # (n,) uint8, uint16 or uint32, whichever just holds the vocabulary; a read-only map of a file
    tokenizer: Tokenizer  # what the ids mean
    fingerprint: str  # SHA-256 over the corpus, the tokenizer and `documents`: equal means equal data
    documents: bool  # whether every line is a document of its own


def encode_corpus(corpus: Corpus, config: DataConfig, *, chunk_bytes: int = CHUNK) -> Encoded:
    """The ids of `corpus`, from the cache, or encoded into it. Line ends are kept as they are.

    The file is read `chunk_bytes` at a time, which does not change the result.

    Raises:
        UserError: text that is not UTF-8, empty, or in use of the terminator; a cache that cannot be written.
    """
    terminator = config.terminator if corpus.documents else "\n"
    key = _sha256_of(format=FORMAT, byteorder=sys.byteorder, corpus=corpus.sha256, tokenizer=config.tokenizer,
                     documents=corpus.documents, terminator=terminator)  # fmt: skip
    folder = cache_folder() / "encoded" / key
    entry = _read(folder, key, corpus)  # without the lock, so that a cache one may only read will do
    if entry is None:
        with locked(folder):
            entry = _read(folder, key, corpus)  # another process made it while this one waited
            if entry is None:
                folder.mkdir(exist_ok=True)
                _build(folder, key, corpus, config.tokenizer, terminator=terminator, chunk_bytes=chunk_bytes)
                entry = _read(folder, key, corpus)
    if entry is None:
        raise UserError(f"GPTEXP_CACHE={cache_folder()}: {folder.name} is not as it was written; allowed: another disk")
    return entry


def _build(folder: Path, key: str, corpus: Corpus, kind: str, *, terminator: str, chunk_bytes: int) -> None:
    """Write the entry, the ids first: so the description never speaks of ids that are not there."""
    tokenizer = ByteTokenizer() if kind == "byte" else _char_tokenizer(corpus, terminator, chunk_bytes)
    dtype = _id_dtype(tokenizer)
    table = None  # of the id of each code point
    if isinstance(tokenizer, CharTokenizer):
        table = np.zeros(ord(tokenizer.symbols[-1]) + 1, dtype)
        table[code_points(tokenizer.symbols)] = np.arange(tokenizer.vocab_size)
    with replacing(folder / "ids.bin") as file:
        for text in _texts(corpus, chunk_bytes):
            file.write(text.encode() if table is None else _char_ids(text.replace("\n", tokenizer.terminator), table))
        n = file.tell() // dtype.itemsize
    description = {"key": key, "n": n, "tokenizer": tokenizer.to_dict()}
    with replacing(folder / "entry.json") as file:
        file.write(json.dumps(description).encode())


def _read(folder: Path, key: str, corpus: Corpus) -> Encoded | None:
    """The entry, or None when it is missing, cut short or not what its name says: then it has to be made again."""
    try:
        entry = json.loads((folder / "entry.json").read_bytes())
        tokenizer = tokenizer_from_dict(entry["tokenizer"])
        ids: NDArray[Any] = np.memmap(folder / "ids.bin", _id_dtype(tokenizer), mode="r")
        if (entry["key"], entry["n"]) != (key, len(ids)):
            return None
    except (OSError, ValueError, TypeError, KeyError, UserError):
        return None
    fingerprint = _sha256_of(corpus=corpus.sha256, tokenizer=tokenizer.to_dict(), documents=corpus.documents)
    return Encoded(ids, tokenizer, fingerprint, corpus.documents)


def _char_tokenizer(corpus: Corpus, terminator: str, chunk_bytes: int) -> CharTokenizer:
    """The tokenizer of all characters that occur in the corpus.

    Raises:
        UserError: the terminator occurs.
    """
    seen = np.zeros(0x110000, bool)  # by code point
    known = b""  # those in ASCII: without them a text is still UTF-8, and mostly short
    for text in _texts(corpus, chunk_bytes):
        codes = code_points(text.encode().translate(None, known).decode())
        if not np.take(seen, codes, mode="clip").all():
            seen[codes] = True
            known = np.flatnonzero(seen[:128]).astype(np.uint8).tobytes()
    if terminator != "\n" and seen[ord(terminator)]:
        raise UserError(
            f"data.terminator={terminator!r}: occurs in {corpus.path}; allowed: a character that does not, or '\\n'"
        )
    if corpus.documents:  # the terminator is in the vocabulary whether a newline occurs or not
        seen[ord("\n")] = False
        seen[ord(terminator)] = True
    return CharTokenizer("".join(map(chr, np.flatnonzero(seen))), terminator)


def _char_ids(text: str, table: NDArray[Any]) -> bytes:
    """The ids of a text whose characters are all in the table of its tokenizer."""
    if table.itemsize == 1 and text.isascii():
        return text.encode().translate(np.resize(table, 256).tobytes())  # far faster than numpy
    return np.take(table, code_points(text), mode="clip").tobytes()


def _texts(corpus: Corpus, chunk_bytes: int) -> Iterator[str]:
    """The corpus in pieces, as text.

    Raises:
        UserError: a file that cannot be read, or has changed; the offset of the first byte that is not UTF-8.
    """
    digest = hashlib.sha256()
    decoder = getincrementaldecoder("utf-8")()
    offset = 0  # of the end of the chunk in the file
    try:
        with open(corpus.path, "rb") as file:
            while chunk := file.read(chunk_bytes):
                digest.update(chunk)
                offset += len(chunk)
                yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except OSError as error:
        raise UserError(f"data.path={corpus.path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:  # its object begins with what was left of the chunk before
        at = offset - len(error.object) + error.start
        raise UserError(
            f"data.path={corpus.path}: not UTF-8, byte 0x{error.object[error.start]:02x} at offset {at}; "
            "allowed: a UTF-8 text file"
        ) from error
    if digest.hexdigest() != corpus.sha256:
        raise UserError(f"data.path={corpus.path}: changed while it was being read; allowed: a file at rest")


def _id_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype(np.min_scalar_type(tokenizer.vocab_size - 1))


def _sha256_of(**parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
