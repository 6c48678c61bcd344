"""Text to ids and back: one id for each distinct character, or one for each byte of UTF-8."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptexp.errors import UserError

Ids = NDArray[np.int64]


class CharTokenizer:
    """One id for each character of a fixed vocabulary, in order of code point.

    Args:
        symbols: the distinct characters of the vocabulary, sorted.
        terminator: the symbol that stands for the newline, in whose place it is in the vocabulary. Both are
            encoded as its id; decoding gives the terminator. "\\n" where no symbol stands in.

    Raises:
        ValueError: symbols that are unsorted or repeated, or a terminator that is not among them.
    """

    def __init__(self, symbols: str, terminator: str = "\n") -> None:
        if not symbols or list(symbols) != sorted(set(symbols)):
            raise ValueError("the vocabulary must be distinct characters in order of code point")
        if len(terminator) != 1 or (terminator != "\n" and (terminator not in symbols or "\n" in symbols)):
            raise ValueError("the terminator must be one character, in the vocabulary in place of the newline")
        self.symbols, self.terminator, self.vocab_size = symbols, terminator, len(symbols)
        self._codes = code_points(symbols)

    def encode(self, text: str, what: str = "prompt") -> Ids:
        """The ids of `text`, (n,) int64.

        Raises:
            UserError: naming the first character that is not in the vocabulary, and its position.
        """
        codes = code_points(text.replace("\n", self.terminator))
        ids = np.searchsorted(self._codes, codes)
        unknown = np.flatnonzero(np.take(self._codes, ids, mode="clip") != codes)
        if len(unknown):
            where = int(unknown[0])
            raise UserError(
                f"{what} character {text[where]!r} (U+{ord(text[where]):04X}) at position {where} "
                f"is not in the vocabulary of {self.vocab_size} characters"
            )
        return ids.astype(np.int64, copy=False)

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids`, any shape, read row by row. ValueError for an id outside the vocabulary."""
        return str(self._codes[_checked(ids, self.vocab_size)].astype("<u4").tobytes().decode("utf-32-le"))

    def to_dict(self) -> dict[str, Any]:
        """The symbols and the terminator, as JSON can hold them."""
        return {"name": "char", "symbols": self.symbols, "terminator": self.terminator}


class ByteTokenizer:
    """The 256 bytes of UTF-8: no text is outside the vocabulary. A document ends with the byte of the newline."""

    vocab_size = 256
    terminator = "\n"

    def encode(self, text: str, what: str = "prompt") -> Ids:
        """The bytes of `text` in UTF-8, (n,) int64. UserError for half a surrogate pair, which has none."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{what} character {text[error.start]!r} (U+{ord(text[error.start]):04X}) at position {error.start} "
                "cannot be written in UTF-8"
            ) from error
        return np.frombuffer(data, np.uint8).astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. ValueError for an id outside 0 .. 255."""
        return _checked(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """The name alone: there is nothing else to it."""
        return {"name": "byte"}


Tokenizer = CharTokenizer | ByteTokenizer
"""What the rest of the program works with: both have the same attributes and methods."""


def tokenizer_from_dict(data: object) -> Tokenizer:
    """The tokenizer that `to_dict` described, checked, since the description may come from anybody's file.

    Raises:
        UserError: anything that `to_dict` would not have written.
    """
    problem = ("not the description of a tokenizer; "
               'allowed: {"name": "byte"} or {"name": "char", "symbols": "...", "terminator": "."}')  # fmt: skip
    match data:
        case {"name": "byte", **others} if not others:
            return ByteTokenizer()
        case {"name": "char", "symbols": str(symbols), "terminator": str(terminator), **others} if not others:
            try:
                symbols.encode()  # half a surrogate pair is no character
                return CharTokenizer(symbols, terminator)
            except ValueError as error:
                problem = str(error)
    raise UserError(f"tokenizer={str(data)[:80]!r}: {problem}")


def code_points(text: str) -> NDArray[np.uint32]:
    """The code point of each character, half a surrogate pair included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32, copy=False)


def _checked(ids: ArrayLike, vocab_size: int) -> Ids:
    array = np.asarray(ids, dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise ValueError(f"ids from {array.min()} to {array.max()}: the vocabulary has 0 to {vocab_size - 1}")
    return array
