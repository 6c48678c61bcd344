"""Byte-pair encoding, by the library tokenizers."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptexp.config.sections import DataConfig
from gptexp.data.files import lines
from gptexp.data.tokenizers import ByteTokenizer, Ids, Tokenizer
from gptexp.errors import UserError
from gptexp.registry import TOKENIZERS

ENDS = "\n\x03"
"""Characters that end a document or an answer; each is always a symbol of its own."""

LONGEST_WORD = 256  # bytes; the time that a word takes grows with the square of its length
LONGEST = 2**20  # characters of a line, which is encoded as if it ended after them
TOGETHER = 2**18  # characters encoded at a time, line by line, on all processors

FEWEST_TIMES = 2  # that two symbols must stand side by side to be made one


@TOKENIZERS.register("bpe")
class BPETokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and pairs of symbols that are frequent in the training split.

    Sennrich, Haddow, Birch 2016, "Neural machine translation of rare words with subword units", on bytes as in GPT-2,
    whose rule for cutting text into words it has. It can encode any text.

    Args:
        merges: the pairs that become a symbol each, in order, as in a file merges.txt: two symbols and a space between
            them on each line, each byte written as the character that GPT-2 has for it.

    Raises:
        ValueError: a line that is not such a pair.
    """

    sized = True

    def __init__(self, merges: str) -> None:
        from tokenizers import models  # here, because it is slow to import

        known = {character: bytes([byte]) for character, byte in _BYTES.items()}
        pairs = []
        for line in merges.split("\n") if merges != "" else ():
            first, _, second = line.partition(" ")
            if not known.keys() >= {first, second}:
                raise ValueError(f"{line[:40]!r} is not a pair of symbols that are known before it")
            pairs.append((first, second))
            known.setdefault(first + second, known[first] + known[second])
        self.merges, self.vocab_size, self._meanings = merges, len(known), list(known.values())
        self._library = _pipeline(models.BPE(dict(zip(known, range(len(known)), strict=True)), pairs))

    @classmethod
    def learn(
        cls, texts: Callable[[], Iterator[str]], terminator: str | None, vocab_size: int = DataConfig.vocab_size
    ) -> Self:
        """The most frequent pairs, one after the other, until there are `vocab_size` symbols.

        Raises:
            UserError: when the text has fewer that occur twice.
        """
        from tokenizers import models, trainers

        library = _pipeline(models.BPE())
        library.train_from_iterator(cls.pieces(texts()), trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=FEWEST_TIMES, show_progress=sys.stderr.isatty(),
            initial_alphabet=list(_BYTES),
        ))  # fmt: skip
        if library.get_vocab_size() < vocab_size:
            raise UserError(f"data.vocab_size={vocab_size}: the training split gives {library.get_vocab_size()} "
                            f"symbols; allowed: at most {library.get_vocab_size()}")  # fmt: skip
        return cls("\n".join(map(" ".join, json.loads(library.to_str())["model"]["merges"])))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The merges."""
        return cls(data["merges"])

    def to_dict(self) -> dict[str, Any]:
        """The merges."""
        return {"name": "bpe", "merges": self.merges}

    @property
    def standard_file(self) -> str:
        """As its base."""
        return str(self._library.to_str(pretty=True))

    @staticmethod
    def pieces(texts: Iterable[str]) -> Iterator[str]:
        """Some lines at a time, since no symbol goes on after the end of its line."""
        held, size = list[str](), 0
        for line in _lines(texts):
            held.append(line)
            size += len(line)
            if size >= TOGETHER:
                yield "".join(held)
                held, size = [], 0
        if held:
            yield "".join(held)

    def encode(self, text: str, what: str = "prompt") -> Ids:
        """As its base; UserError for half a surrogate pair, which is no text."""
        ByteTokenizer().encode(text, what)
        encoded = self._library.encode_batch_fast(list(_lines([text])))
        return np.fromiter((i for line in encoded for i in line.ids), np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """As its base; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._meanings[i] for i in self._checked(ids).flat).decode("utf-8", errors="replace")

    def characters(self, ids: Ids) -> int:
        """As its base; a symbol counts for the characters that begin in it."""
        return int(self._begun[ids].sum())

    @property
    def symbols_by_id(self) -> list[str]:
        """The text of each symbol; one that is a part of a character has its bytes as a byte tokenizer has them."""
        return [_readable(meaning) for meaning in self._meanings]

    @cached_property
    def _begun(self) -> NDArray[np.int64]:
        return np.array([ByteTokenizer().characters(np.frombuffer(meaning, np.uint8)) for meaning in self._meanings])


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of a text; very long ones in parts."""
    for line in lines(texts):
        yield from (line[at : at + LONGEST] for at in range(0, len(line), LONGEST))


def _pipeline(model: Any) -> Any:
    """The library's tokenizer: text is cut into words, at the characters that end anything, and then into symbols."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

    library = Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(f"[{ENDS}]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.FixedLength(LONGEST_WORD),
    ])  # fmt: skip
    library.decoder = decoders.ByteLevel()
    return library


def _readable(meaning: bytes) -> str:
    try:
        return meaning.decode()
    except UnicodeDecodeError:
        return "".join(map(ByteTokenizer().symbols_by_id.__getitem__, meaning))


def _byte_characters() -> dict[str, int]:
    """The byte that each of GPT-2's 256 characters stands for: Latin-1 where that prints, others from U+0100 on."""
    prints = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = sorted(set(range(256)) - set(prints))
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()  # in order of code point, which is that of their ids
