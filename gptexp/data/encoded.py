"""A corpus as an array of ids on disk: made once in bounded memory, then mapped.

The entry of a corpus in the cache is a folder with `ids.bin` (the ids, in the machine's byte order) and
`entry.json` (what they are). It is named after all that determines the ids, so it never goes out of date.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gptexp.data.cache import cache_folder, locked, replacing, writes_to_cache
from gptexp.data.corpora import Corpus
from gptexp.data.settings import DataConfig
from gptexp.data.tokenizer import ByteTokenizer, CharTokenizer, tokenizer_from_dict
from gptexp.errors import UserError

Job = Callable[[], object]
CHUNK = 2**20  # bytes; larger ones are slower, as they outgrow the processor's cache
FORMAT = 1  # of the cache entry; to be raised whenever the same corpus would be written otherwise


@dataclass(frozen=True, eq=False)
class Encoded:
    """The ids of a whole corpus.

    Attributes:
        ids: (n,) uint8, uint16 or uint32, whichever just holds the vocabulary; a read-only map of a file.
        tokenizer: what the ids mean.
        fingerprint: SHA-256 over the corpus, the tokenizer and `documents`: equal means equal data.
        documents: whether every line is a document of its own.
    """

    ids: NDArray[Any]
    tokenizer: CharTokenizer | ByteTokenizer
    fingerprint: str
    documents: bool


def encode_corpus(corpus: Corpus, config: DataConfig, *, chunk_bytes: int = CHUNK) -> Encoded:
    """The ids of `corpus`, from the cache, or encoded into it. Line ends are kept as they are.

    Args:
        corpus: as `find_corpus` returned it.
        config: its tokenizer and, for documents, its terminator are used.
        chunk_bytes: how much of the file is in memory at a time; no effect on the result.

    Raises:
        UserError: text that is not UTF-8, empty, or in use of the terminator; a cache that cannot be written.
    """
    terminator = config.terminator if corpus.documents else "\n"
    key = _sha256_of(
        format=FORMAT,
        byteorder=sys.byteorder,
        corpus=corpus.sha256,
        tokenizer=config.tokenizer,
        documents=corpus.documents,
        terminator=terminator,
    )
    folder = cache_folder() / "encoded" / key
    entry = _read(folder, key, corpus)  # without the lock, so that a cache one may only read will do
    if entry is None:
        with writes_to_cache(), locked(folder):
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
    tokenizer: CharTokenizer | ByteTokenizer = ByteTokenizer()
    if kind == "char":
        tokenizer = CharTokenizer(_vocabulary(corpus, terminator, chunk_bytes), terminator)
    dtype = _id_dtype(tokenizer)
    digest = hashlib.sha256()
    with replacing(folder / "ids.bin") as file:
        _overlapped(
            (partial(digest.update, chunk), partial(_write, file, ids))
            for chunk, ids in _encoded_chunks(corpus, tokenizer, dtype, chunk_bytes)
        )
        n = file.tell() // dtype.itemsize
        if digest.hexdigest() != corpus.sha256:
            raise UserError(f"data.path={corpus.path}: changed while it was being read; allowed: a file at rest")
    description = {"key": key, "n": n, "tokenizer": tokenizer.to_dict()}
    with replacing(folder / "entry.json") as file:
        file.write(json.dumps(description).encode())


def _read(folder: Path, key: str, corpus: Corpus) -> Encoded | None:
    """The entry, or None when it is missing, cut short or not what its name says: then it has to be made again."""
    try:
        entry = json.loads((folder / "entry.json").read_bytes())
        if not isinstance(entry, dict) or entry.get("key") != key:
            return None
        tokenizer = tokenizer_from_dict(entry.get("tokenizer"))
        dtype = _id_dtype(tokenizer)
        size = (folder / "ids.bin").stat().st_size
        if size == 0 or size != entry.get("n", 0) * dtype.itemsize:
            return None
        ids: NDArray[Any] = np.memmap(folder / "ids.bin", dtype, mode="r")
    except (OSError, ValueError, TypeError, UserError):
        return None
    fingerprint = _sha256_of(corpus=corpus.sha256, tokenizer=tokenizer.to_dict(), documents=corpus.documents)
    return Encoded(ids, tokenizer, fingerprint, corpus.documents)


def _vocabulary(corpus: Corpus, terminator: str, chunk_bytes: int) -> str:
    """The distinct characters of the corpus, sorted; the terminator in place of the newline for documents."""
    ascii_seen = b""
    other_seen = np.zeros(0x110000, bool)  # by code point

    def jobs() -> Iterator[tuple[Job, ...]]:
        nonlocal ascii_seen
        for chunk, text in _chunks(corpus, chunk_bytes):
            if text is not None:
                yield (partial(_mark, other_seen, _code_points(text)),)
                continue
            # What is left when the known characters are deleted is new. A set is slow, so it only sees a little.
            rest = chunk.translate(None, ascii_seen)
            while rest:
                ascii_seen += bytes(set(rest[:4096]))
                rest = rest.translate(None, ascii_seen)

    _overlapped(jobs())
    symbols = set(ascii_seen.decode()) | {chr(code) for code in np.flatnonzero(other_seen)}
    if not corpus.documents:
        return "".join(sorted(symbols))
    if terminator != "\n" and terminator in symbols:
        raise UserError(
            f"data.terminator={terminator!r}: occurs in {corpus.path}; allowed: a character that does not, or '\\n'"
        )
    return "".join(sorted(symbols - {"\n"} | {terminator}))


def _mark(seen: NDArray[np.bool_], codes: NDArray[Any]) -> None:
    known = np.take(seen, codes, mode="clip")  # several times quicker than setting them all
    seen[codes[~known]] = True


def _encoded_chunks(
    corpus: Corpus, tokenizer: CharTokenizer | ByteTokenizer, dtype: np.dtype[Any], chunk_bytes: int
) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
    """Pieces of the file, and for each a function that gives its ids as bytes."""
    if isinstance(tokenizer, ByteTokenizer):
        yield from ((chunk, partial(bytes, chunk)) for chunk, _ in _chunks(corpus, chunk_bytes))
        return
    table = tokenizer.table(dtype)
    ascii_table = np.resize(table[:128], 256).tobytes() if dtype == np.uint8 else b""
    for chunk, text in _chunks(corpus, chunk_bytes):
        if text is None and ascii_table:
            yield chunk, partial(chunk.translate, ascii_table)
        else:
            yield chunk, partial(_taken, table, np.frombuffer(chunk, np.uint8) if text is None else _code_points(text))


def _taken(table: NDArray[Any], codes: NDArray[Any]) -> bytes:
    # Clipping, rather than an IndexError, where the file has changed since the vocabulary was made.
    return np.take(table, codes, mode="clip").tobytes()


def _write(file: BinaryIO, ids: Callable[[], bytes]) -> None:
    file.write(ids())


def _overlapped(steps: Iterable[tuple[Job, ...]]) -> None:
    """Do the jobs of each step side by side while the next step is prepared, but never run ahead of them.

    Hashing, writing and numpy let go of the interpreter's lock, so that a second core is of use.
    """
    with ThreadPoolExecutor(2) as pool:
        running: list[Future[object]] = []
        for jobs in steps:
            for future in running:
                future.result()
            running = [pool.submit(job) for job in jobs]
        for future in running:
            future.result()


def _chunks(corpus: Corpus, chunk_bytes: int) -> Iterator[tuple[bytes, str | None]]:
    """The file in pieces of whole characters: the bytes, and the text unless it is ASCII.

    Raises:
        UserError: an empty or unreadable file; the offset of the first byte that is not UTF-8.
    """
    offset = 0  # of the piece at hand in the file
    carried = b""  # the beginning of a character whose end is in the next piece
    try:
        with open(corpus.path, "rb") as file:
            while True:
                piece = file.read(chunk_bytes)
                chunk = carried + piece
                if not chunk:
                    break
                whole = _whole(chunk) if piece else len(chunk)
                chunk, carried = chunk[:whole], chunk[whole:]
                if chunk:
                    yield chunk, None if chunk.isascii() else _text(corpus, chunk, offset)
                offset += whole
    except OSError as error:
        raise UserError(f"data.path={corpus.path}: cannot be read ({error.strerror})") from error
    if offset == 0:
        raise UserError(f"data.path={corpus.path}: empty; allowed: a UTF-8 text file that is not empty")


def _text(corpus: Corpus, chunk: bytes, offset: int) -> str:
    try:
        return chunk.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path={corpus.path}: not UTF-8, byte 0x{chunk[error.start]:02x} at offset {offset + error.start}; "
            "allowed: a UTF-8 text file"
        ) from error


def _whole(chunk: bytes) -> int:
    """The length of `chunk` without a character that is cut off at its end."""
    for back in range(1, min(3, len(chunk)) + 1):
        byte = chunk[-back]
        if byte >= 0xC0:  # opens a character of 2, 3 or 4 bytes
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(chunk) - back if length > back else len(chunk)
        if byte < 0x80:
            break
    return len(chunk)


def _code_points(text: str) -> NDArray[Any]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _id_dtype(tokenizer: CharTokenizer | ByteTokenizer) -> np.dtype[Any]:
    return np.dtype(np.min_scalar_type(tokenizer.vocab_size - 1))


def _sha256_of(**parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
