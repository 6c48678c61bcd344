"""Byte-pair encoding: against a naive one, what it learns from, and how it is stored."""

import json
import re
from collections import Counter
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer

from gptexp.config.sections import DataConfig
from gptexp.data.bpe import BPETokenizer
from gptexp.data.corpora import find_corpus
from gptexp.data.datamodule import CharDataModule
from gptexp.data.encoding import encode_corpus
from gptexp.data.tokenizers import tokenizer_from_dict
from gptexp.errors import UserError

TEXT = ("We know what we are, but know not what we may be.\n\nMy lord, I've 12 ducats; the lords' ducats are 120!\n"
        "what's here? the what, the where -- naïve façade, 中文, 😀😀\n") * 20  # fmt: skip
WORD = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def words(text: str) -> list[list[bytes]]:
    """The bytes of each word; every line ends by itself."""
    return [[bytes([b]) for b in word.encode()] for piece in re.split("(\n)", text) for word in WORD.findall(piece)]


def joined(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    made: list[bytes] = []
    rest = list(word)
    while rest:
        if tuple(rest[:2]) == pair:
            made.append(rest.pop(0) + rest.pop(0))
        else:
            made.append(rest.pop(0))
    return made


def naive_merges(text: str, count: int) -> list[tuple[bytes, bytes]]:
    """The most frequent pair, again and again; of equally frequent ones, the one whose symbols are older."""
    parts, merges = words(text), list[tuple[bytes, bytes]]()
    order = {byte: n for n, byte in enumerate(sorted((bytes([b]) for b in range(256)), key=alphabet))}
    for _ in range(count):
        pairs = Counter(pair for word in parts for pair in pairwise(word))
        best = max(pairs, key=lambda p: (pairs[p], -order[p[0]], -order[p[1]]))
        merges.append(best)
        order.setdefault(best[0] + best[1], len(order))
        parts = [joined(word, best) for word in parts]
    return merges


def alphabet(byte: bytes) -> int:
    """The place of a byte among GPT-2's characters: those that print come first."""
    (code,) = byte
    return code + 1000 * (code <= 32 or 127 <= code <= 160 or code == 173)


def learned(text: str = TEXT, vocab_size: int = 300) -> BPETokenizer:
    return BPETokenizer.learn(lambda: iter([text]), None, vocab_size)


def test_against_a_naive_one() -> None:
    """The pairs that are learned, the ids of the symbols, and the ids of a text."""
    tokenizer, merges = learned(), naive_merges(TEXT, 44)
    symbols = sorted((bytes([b]) for b in range(256)), key=alphabet) + [a + b for a, b in merges]
    assert tokenizer.vocab_size == 300
    assert [tokenizer.encode(s.decode()).tolist() for s in symbols[256:] if readable(s)] == [
        [i] for i, s in enumerate(symbols) if i >= 256 and readable(s)
    ]
    text, expected = "We know 12 lords -- naïve 😀 what's\n\nhere?\n", list[int]()
    for word in words(text):
        expected += [symbols.index(part) for part in reduce(joined, merges, word)]
    assert tokenizer.encode(text).tolist() == expected
    assert len(expected) < len(text.encode())


def readable(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(text: str) -> None:
    tokenizer = learned(vocab_size=280)
    ids = tokenizer.encode(text)
    assert (ids.dtype, tokenizer.decode(ids), tokenizer.characters(ids)) == (np.int64, text, len(text))
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.encode(text).tolist() == ids.tolist()
    standard = LibraryTokenizer.from_str(tokenizer.standard_file)
    assert standard.encode(text).ids == ids.tolist()
    assert standard.decode(ids.tolist()) == text


def test_symbols_are_told_apart() -> None:
    names = learned().symbols_by_id
    assert len(set(names)) == 300
    assert {"\n", "a", " the", "\\xf0", " we"} <= set(names)


def test_ends_are_symbols_of_their_own() -> None:
    tokenizer = learned("end.\x03\n" * 50, 258)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("end.\x03\n\n")] == ["end", ".", "\x03", "\n", "\n"]


@pytest.mark.parametrize("merges", ["ab", "a bc", "a b c", "a b\n", 3, None])
def test_merges_that_are_none(merges: object) -> None:
    with pytest.raises(UserError, match=r"^tokenizer="):
        tokenizer_from_dict({"name": "bpe", "merges": merges})


def test_half_a_surrogate_pair() -> None:
    with pytest.raises(UserError, match=r"start character .*U\+DC80\) at position 1"):
        learned().encode("a\udc80", "start")


def data(folder: Path, text: str, **settings: object) -> CharDataModule:
    path = folder / ("text.jsonl" if settings.get("jsonl") else "text.txt")
    path.write_text(text, encoding="utf-8")
    task = {"name": settings.pop("task", "text")}
    settings.pop("jsonl", None)
    made = CharDataModule({"name": "file", "path": str(path), **settings}, task, block_size=64)
    made.setup()
    return made


def test_learned_from_the_training_split_alone(tmp_path: Path) -> None:
    """So another end of the text changes nothing in the tokenizer, and everything is still encoded."""
    settings = {"tokenizer": "bpe", "vocab_size": 290}
    first = data(tmp_path, TEXT * 2 + "zqzq " * 500, val_fraction=2500 / (2 * len(TEXT) + 2500), **settings)
    other = data(tmp_path, TEXT * 2 + "qzqz " * 500, val_fraction=2500 / (2 * len(TEXT) + 2500), **settings)
    assert first.encoded.tokenizer.to_dict() == other.encoded.tokenizer.to_dict()
    assert first.encoded.fingerprint != other.encoded.fingerprint
    tokenizer = first.encoded.tokenizer
    assert tokenizer.decode(first.encoded.ids) == TEXT * 2 + "zqzq " * 500
    assert tokenizer.decode(first.encoded.ids[first.encoded.val_start :]) == "zqzq " * 500


def test_documents_learn_from_those_of_the_training_split_alone(tmp_path: Path) -> None:
    lines = [f"{'abcdefghij'[n % 10] * 8}{n:04}" for n in range(200)]
    plain = data(tmp_path, "\n".join(lines), task="documents")
    ids, held_out = plain.encoded.tokenizer, set[str]()
    for row in plain.val.rows(np.arange(plain.val.n_rows)).y:
        held_out.add(ids.decode(row[row >= 0]).strip("\n"))
    changed = [line if line not in held_out else line[::-1].upper() * 2 for line in lines]
    settings = {"task": "documents", "tokenizer": "bpe", "vocab_size": 300}
    one, two = (data(tmp_path, "\n".join(some), **settings) for some in (lines, changed))
    assert one.encoded.tokenizer.to_dict() == two.encoded.tokenizer.to_dict()
    assert one.encoded.ids.tolist() != two.encoded.ids.tolist()
    assert one.val.n_rows == plain.val.n_rows == len(held_out)


def test_problems_learn_from_those_of_the_training_split_alone(tmp_path: Path) -> None:
    entries = [{"prompt": f"say {n} ", "answer": "yes yes" if n % 2 else "no no"} for n in range(60)]

    def made(entries: list[dict[str, str]]) -> CharDataModule:
        text = "\n".join(map(json.dumps, entries))
        return data(tmp_path, text, jsonl=True, task="problems", tokenizer="bpe", vocab_size=262)

    one = made(entries)
    held_out = {problem.prompt for problem in one.val.problems}  # type: ignore[attr-defined]
    two = made([e | {"answer": "qqqqqq" * 5} if e["prompt"] in held_out else e for e in entries])
    assert one.encoded.tokenizer.to_dict() == two.encoded.tokenizer.to_dict()
    answers = {problem.answer for problem in two.val.problems}  # type: ignore[attr-defined]
    assert answers == {"qqqqqq" * 5}


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_every_tokenizer_holds_out_the_same_text(tokenizer: str, tmp_path: Path) -> None:
    """Whatever a character takes, so that bits per character are of the same characters."""
    text = TEXT + "é中😀" * 100
    made = data(tmp_path, text, tokenizer=tokenizer, **({"vocab_size": 290} if tokenizer == "bpe" else {}))
    rows = made.val.rows(np.arange(made.val.n_rows))
    cut = round(0.9 * len(text) - 0.5)
    assert made.encoded.tokenizer.decode(rows.y[rows.y >= 0]) == text[cut:]
    assert made.chars_per_token * made.val.n_tokens == pytest.approx(len(text) - cut)


@pytest.mark.parametrize(("text", "chunk"), [
    (TEXT, 1), (TEXT, 7), (TEXT, 1000), ("words, " * 200_000, 50_000), (f"{'a' * 2**20}b\n" + TEXT * 200, 50_000),
], ids=["single", "few", "many", "no line ends", "a long line"])  # fmt: skip
def test_ids_do_not_depend_on_the_pieces_read(
    text: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    config = DataConfig(name="file", path=str(tmp_path / "text.txt"), tokenizer="bpe", vocab_size=258)
    found = []
    for number, size in enumerate((chunk, 2**20)):
        monkeypatch.setenv("GPTEXP_CACHE", str(tmp_path / f"cache{number}"))
        encoded = encode_corpus(find_corpus(config), config, chunk_bytes=size)
        assert encoded.tokenizer.decode(encoded.ids) == text
        found.append((encoded.ids.tolist(), encoded.fingerprint, encoded.val_start))
    assert found[0] == found[1]


def test_more_symbols_than_the_text_gives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.vocab_size=9000: the training split gives (\d+) symbols; allowed: at"):
        data(tmp_path, TEXT, tokenizer="bpe", vocab_size=9000)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"vocab_size": 600}, "data.vocab_size=600: has no effect with data.tokenizer=char; allowed: data.tokenizer=b"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "data.vocab_size=256: must be an integer of at least 257"),
    ],
)
def test_sizes_that_are_none(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        CharDataModule(settings)
    assert caught.value.problems[0].startswith(problem)
