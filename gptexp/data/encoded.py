"""A corpus as an array of ids on disk: made once in bounded memory, then mapped.

The entry of a corpus in the cache is a folder with `ids.bin` (the ids, in the machine's byte order) and
`entry.json` (what they are). It is named after all that determines the ids, so it never goes out of date.
"""

import hashlib
import json
import sys
from collections import deque
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
BLOCK = 2**16  # characters; for the same reason, as numpy takes ids by integers of 8 bytes
AHEAD = 2  # steps that may wait for their turn, so that no thread waits for another at every step
EARLY = 16  # pieces, in which most texts have shown all their characters
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
    digest = hashlib.sha256()  # of the very bytes that became ids
    with replacing(folder / "ids.bin") as file:
        chars = _CharIds(file, corpus, terminator) if kind == "char" else None
        _overlapped(
            (partial(digest.update, chunk), partial(chars.add, text) if chars else partial(_write, file, chunk))
            for chunk, text in _chunks(corpus, chunk_bytes)
        )
        if digest.hexdigest() != corpus.sha256:
            raise UserError(f"data.path={corpus.path}: changed while it was being read; allowed: a file at rest")
        tokenizer = chars.settle() if chars else ByteTokenizer()
        n = file.tell() // _id_dtype(tokenizer).itemsize
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


class _CharIds:
    """The ids of a text, written while its vocabulary is still unknown, so that it is read only once.

    A character gets the next free id when it is first met. After the first pieces, and again at the end, the ids
    in the file are replaced by those in order of code point; mostly none has changed since the first time.
    """

    def __init__(self, file: BinaryIO, corpus: Corpus, terminator: str) -> None:
        self._file = file
        self._corpus = corpus
        self._terminator = terminator
        self._pieces = 0
        self._dtype = np.dtype(np.uint8)
        self._codes = np.zeros(0, np.uint32)  # the character of each id
        self._ids = np.full(0x110000, -1, np.int32)  # the id of each character; -1 until it is met
        # The newline of documents is in the vocabulary whether it occurs or not.
        self._number(np.array([ord("\n")] if corpus.documents else [], np.uint32))

    def add(self, text: str) -> None:
        """Write the ids of one more piece.

        Raises:
            UserError: the terminator occurs.
        """
        for start in range(0, len(text), BLOCK):
            _write(self._file, self._encoded(text[start : start + BLOCK]))
        self._pieces += 1
        if self._pieces == EARLY:
            self.settle()

    def settle(self) -> CharTokenizer:
        """Put the ids that were written in order, and return what they mean."""
        symbols = "".join(map(chr, self._codes))
        if self._corpus.documents:
            symbols = symbols.replace("\n", self._terminator)
        tokenizer = CharTokenizer("".join(sorted(symbols)), self._terminator)
        dtype = _id_dtype(tokenizer)
        ids = tokenizer.table(dtype)[self._codes]
        if dtype != self._dtype or (ids[1:] < ids[:-1]).any():
            _replace(self._file, self._dtype, ids)
            self._dtype = dtype
            in_order = self._codes[np.argsort(ids)]
            self._codes = in_order[:0]
            self._number(in_order)
        return tokenizer

    def _encoded(self, text: str) -> bytes:
        if self._ascii and text.isascii():
            ids = text.encode().translate(self._ascii)  # quickest, and 255 tells of a character that was not met
            if 255 not in ids:
                return ids if self._dtype == np.uint8 else np.frombuffer(ids, np.uint8).astype(self._dtype).tobytes()
        codes = _code_points(text)
        found = np.take(self._ids, codes)
        if found.min() < 0:
            self._meet(np.unique(codes[found < 0]))
            found = np.take(self._ids, codes)
        return found.astype(self._dtype).tobytes()

    def _meet(self, codes: NDArray[Any]) -> None:
        if self._terminator != "\n" and ord(self._terminator) in codes:
            raise UserError(
                f"data.terminator={self._terminator!r}: occurs in {self._corpus.path}; "
                "allowed: a character that does not, or '\\n'"
            )
        self._number(codes)
        if len(self._codes) > np.iinfo(self._dtype).max + 1:
            self.settle()  # with more bytes an id

    def _number(self, codes: NDArray[Any]) -> None:
        """Give the next ids to the characters."""
        self._ids[codes] = np.arange(len(self._codes), len(self._codes) + len(codes))
        self._codes = np.append(self._codes, codes)
        ids = self._ids[:128]
        self._ascii = np.resize(ids, 256).astype(np.uint8).tobytes() if ids.max() < 256 else b""  # -1 becomes 255


def _replace(file: BinaryIO, old: np.dtype[Any], table: NDArray[Any]) -> None:
    """Put `table[id]` in the place of every id in the file.

    From the end to the beginning, for then wider ids only take the place of those that were read already.
    """
    n = file.tell() // old.itemsize
    in_bytes = np.resize(table, 256).tobytes() if old == table.dtype == np.uint8 else b""
    for start in reversed(range(0, n, CHUNK)):
        file.seek(start * old.itemsize)
        ids = file.read(min(CHUNK, n - start) * old.itemsize)
        ids = ids.translate(in_bytes) if in_bytes else np.take(table, np.frombuffer(ids, old)).tobytes()
        file.seek(start * table.itemsize)
        _write(file, ids)
    file.seek(n * table.itemsize)


def _write(file: BinaryIO, ids: bytes) -> None:
    file.write(ids)


def _overlapped(steps: Iterable[tuple[Job, Job]]) -> None:
    """Do the first jobs of all steps in turn, the second jobs in turn beside them, and prepare steps meanwhile.

    Hashing, writing and numpy let go of the interpreter's lock, so that a second core is of use.
    """
    waiting: deque[list[Future[object]]] = deque()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for one, other in steps:
            waiting.append([first.submit(one), second.submit(other)])
            if len(waiting) > AHEAD:
                for future in waiting.popleft():
                    future.result()
        for futures in waiting:
            for future in futures:
                future.result()


def _chunks(corpus: Corpus, chunk_bytes: int) -> Iterator[tuple[bytes, str]]:
    """The file in pieces of whole characters: the bytes and the text.

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
                    yield chunk, _text(corpus, chunk, offset)
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
