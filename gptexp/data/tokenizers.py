"""Text to ids and back. A tokenizer is learned from a corpus; run.json holds what its `to_dict` returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptexp.config.sections import DataConfig
from gptexp.errors import UserError
from gptexp.registry import TOKENIZERS

Ids = NDArray[np.int64]


class Tokenizer(ABC):
    """Base of every tokenizer.

    Attributes:
        vocab_size: number of symbols V.
        terminator: the symbol that replaces the newline; documents have it at both ends.
        one_per_character: whether every character is one symbol, so any of them can be the terminator. What is held
            out is then known by counting symbols, and a vocabulary learned from all of the text tells nothing more.
        sized: whether `data.vocab_size` says how many symbols there are; `learn` takes that, too.
    """

    vocab_size: int
    terminator = "\n"
    one_per_character = False
    sized = False

    @classmethod
    @abstractmethod
    def learn(cls, texts: Callable[[], Iterator[str]], terminator: str | None) -> Self:
        """The tokenizer of a corpus.

        Args:
            texts: each call reads the corpus from its beginning, in pieces; its training split alone, unless
                `one_per_character`.
            terminator: the symbol that replaces the newline; None keeps the newline.

        Raises:
            UserError: when the terminator occurs in the text.
        """

    @classmethod
    @abstractmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The tokenizer that `to_dict` described. ValueError or TypeError for any other description."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything that defines it, in types that JSON has; "name" is the registered one."""

    @abstractmethod
    def encode(self, text: str, what: str = "prompt") -> Ids:
        """The ids of a text, (n,) int64. UserError if it cannot be encoded; `what` names the text in it."""

    @abstractmethod
    def decode(self, ids: ArrayLike) -> str:
        """The text of ids of any shape, row by row. ValueError for an id outside the vocabulary."""

    def characters(self, ids: Ids) -> int:
        """Number of characters in the text of ids."""
        return len(self.decode(ids))

    @staticmethod
    def pieces(texts: Iterable[str]) -> Iterator[str]:
        """A text that comes in pieces, in pieces that can be encoded each by itself."""
        yield from texts

    @property
    def standard_file(self) -> str | None:
        """The content of tokenizer.json, which the library tokenizers reads; None where it knows no such tokenizer."""
        return None

    @property
    def symbols_by_id(self) -> list[str]:
        """What each id stands for; equal for equal symbols of two tokenizers of a kind."""
        return [self.decode([i]) for i in range(self.vocab_size)]

    def packed(self, text: str) -> bytes:
        """The ids of a piece of the corpus, each in the bytes of `dtype`."""
        return self.encode(text).astype(self.dtype).tobytes()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest of uint8, uint16 and uint32 that holds the vocabulary."""
        return np.dtype(np.min_scalar_type(self.vocab_size - 1))

    def _checked(self, ids: ArrayLike) -> Ids:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ValueError(f"ids from {array.min()} to {array.max()}: the vocabulary has 0 to {self.vocab_size - 1}")
        return array


@TOKENIZERS.register("char")
class CharTokenizer(Tokenizer):
    """One id for each distinct character of the corpus, in order of code point.

    Args:
        symbols: the distinct characters of the vocabulary, sorted.
        terminator: the symbol that replaces the newline in the vocabulary. Both are encoded as its id; decoding gives
            the terminator. "\\n" keeps the newline.

    Raises:
        ValueError: symbols that are unsorted or repeated, or a terminator that is not among them.
    """

    one_per_character = True

    def __init__(self, symbols: str, terminator: str = "\n") -> None:
        symbols.encode()  # an error for half a surrogate pair, which is not a character
        if not symbols or list(symbols) != sorted(set(symbols)):
            raise ValueError("the vocabulary must be distinct characters in order of code point")
        if len(terminator) != 1 or (terminator != "\n" and (terminator not in symbols or "\n" in symbols)):
            raise ValueError("the terminator must be one character, in the vocabulary in place of the newline")
        self.symbols, self.terminator, self.vocab_size = symbols, terminator, len(symbols)
        self._codes = code_points(symbols)

    @classmethod
    def learn(cls, texts: Callable[[], Iterator[str]], terminator: str | None) -> Self:
        """A vocabulary of all characters that occur."""
        seen = np.zeros(0x110000, bool)  # by code point
        known = b""  # those in ASCII; without them, what is left of a piece is short
        for text in texts():
            codes = code_points(text.encode().translate(None, known).decode())
            if not np.take(seen, codes, mode="clip").all():
                seen[codes] = True
                known = np.flatnonzero(seen[:128]).astype(np.uint8).tobytes()
        if terminator is not None:  # it is in the vocabulary even if there is no newline
            if terminator != "\n" and seen[ord(terminator)]:
                raise UserError(f"task.terminator={terminator!r}: occurs in the text; allowed: a character that does "
                                "not, or '\\n'")  # fmt: skip
            seen[ord("\n")], seen[ord(terminator)] = False, True
        return cls("".join(map(chr, np.flatnonzero(seen))), terminator or "\n")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The symbols and the terminator."""
        return cls(data["symbols"], data["terminator"])

    def to_dict(self) -> dict[str, Any]:
        """The symbols and the terminator."""
        return {"name": "char", "symbols": self.symbols, "terminator": self.terminator}

    def encode(self, text: str, what: str = "prompt") -> Ids:
        """As its base; an error names the first character that is not in the vocabulary, and its position."""
        codes = code_points(text.replace("\n", self.terminator))
        ids = np.searchsorted(self._codes, codes)
        unknown = np.flatnonzero(np.take(self._codes, ids, mode="clip") != codes)
        if len(unknown):
            where = int(unknown[0])
            raise UserError(f"{what} character {text[where]!r} (U+{ord(text[where]):04X}) at position {where} "
                            f"is not in the vocabulary of {self.vocab_size} characters")  # fmt: skip
        return ids.astype(np.int64, copy=False)

    def decode(self, ids: ArrayLike) -> str:
        """As its base."""
        return str(self._codes[self._checked(ids)].astype("<u4").tobytes().decode("utf-32-le"))

    @cached_property
    def _table(self) -> NDArray[Any]:
        """The id of each code point of the corpus."""
        table = np.zeros(ord(self.symbols[-1]) + 1, self.dtype)
        table[self._codes] = np.arange(self.vocab_size)
        return table

    @cached_property
    def _ascii(self) -> bytes:
        return np.resize(self._table, 256).tobytes()

    def packed(self, text: str) -> bytes:
        """As its base; all characters must be in the vocabulary."""
        text = text.replace("\n", self.terminator)
        if self.dtype.itemsize == 1 and text.isascii():
            return text.encode().translate(self._ascii)  # far faster than numpy
        return np.take(self._table, code_points(text), mode="clip").tobytes()


@TOKENIZERS.register("byte")
class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, which can encode any text. A document ends with the byte of the newline."""

    vocab_size = 256

    @classmethod
    def learn(cls, texts: Callable[[], Iterator[str]], terminator: str | None) -> Self:
        """Nothing needs to be learned."""
        return cls()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """All byte tokenizers are equal."""
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """The name alone."""
        return {"name": "byte"}

    def encode(self, text: str, what: str = "prompt") -> Ids:
        """The bytes of the text. UserError for half a surrogate pair, which has none."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            at = error.start
            raise UserError(f"{what} character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} cannot be written "
                            "in UTF-8") from error  # fmt: skip
        return np.frombuffer(data, np.uint8).astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._checked(ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    @property
    def symbols_by_id(self) -> list[str]:
        """The bytes; those of ASCII are characters, others are parts of some."""
        return [chr(i) if i < 128 else f"\\x{i:02x}" for i in range(256)]

    def characters(self, ids: Ids) -> int:
        """As its base; bytes 10xxxxxx continue a character."""
        return int(np.count_nonzero(ids & 0xC0 != 0x80))

    def packed(self, text: str) -> bytes:
        """As its base."""
        return text.encode()


def learn_tokenizer(data: DataConfig, texts: Callable[[], Iterator[str]], terminator: str | None) -> Tokenizer:
    """The tokenizer that the settings ask for; arguments and errors are those of its `learn`."""
    made = TOKENIZERS[data.tokenizer].made
    size = {"vocab_size": data.vocab_size} if made.sized else {}
    tokenizer: Tokenizer = made.learn(texts, terminator, **size)
    return tokenizer


def tokenizer_from_dict(data: object) -> Tokenizer:
    """The tokenizer that `to_dict` described, with a check, since the description may come from anyone's file.

    Raises:
        UserError: any description that `to_dict` would not have written.
    """
    problem = f"not the description of a tokenizer; allowed: one with a name of {', '.join(TOKENIZERS)}"
    if isinstance(data, dict) and data.get("name") in list(TOKENIZERS):
        try:
            tokenizer: Tokenizer = TOKENIZERS[data["name"]].made.from_dict(data)
            if tokenizer.to_dict() == data:
                return tokenizer
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = str(error)
    raise UserError(f"tokenizer={str(data)[:80]!r}: {problem}")


def code_points(text: str) -> NDArray[np.uint32]:
    """The code point of each character; half a surrogate pair has one, too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32, copy=False)
