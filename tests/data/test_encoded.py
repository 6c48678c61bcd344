import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptexp.data import encoded as module
from gptexp.data.corpora import find_corpus
from gptexp.data.encoded import Encoded, encode_corpus
from gptexp.data.settings import DataConfig
from gptexp.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def encode(text: str | bytes, folder: Path, chunk_bytes: int = 2**20, **settings: object) -> Encoded:
    path = folder / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    config = DataConfig(name="file", path=str(path), **settings)  # type: ignore[arg-type]
    return encode_corpus(find_corpus(config), config, chunk_bytes=chunk_bytes)


@settings(max_examples=150, deadline=None)
@given(TEXT, st.integers(1, 9))
@example("aé\r\n中😀", 1)
@example("".join(map(chr, range(300))), 7)  # 300 symbols: two bytes an id
def test_equals_a_naive_encoding_whatever_the_chunks(text, chunk_bytes):
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, GPTEXP_CACHE=f"{folder}/cache"):
        chars = encode(text, Path(folder), chunk_bytes)
        index = {symbol: number for number, symbol in enumerate(sorted(set(text)))}
        assert chars.ids.tolist() == [index[character] for character in text]
        assert chars.ids.dtype == (np.uint8 if len(index) <= 256 else np.uint16)
        assert chars.tokenizer.to_dict()["symbols"] == "".join(index)
        in_bytes = encode(text, Path(folder), chunk_bytes, tokenizer="byte")
        assert in_bytes.ids.tobytes() == text.encode()
        assert in_bytes.fingerprint != chars.fingerprint


@st.composite
def growing(draw: st.DrawFn) -> str:
    """A text in which new characters come all the time, in any order, and old ones in between."""
    first = draw(st.sampled_from([0x00, 0x61, 0x3F0, 0x4E00, 0x1F600]))
    symbols = [chr(first + i) for i in range(draw(st.integers(1, 330)))]
    random = Random(draw(st.integers(0, 999)))
    random.shuffle(symbols)
    olds = draw(st.integers(0, 3))
    return "".join(s + "".join(random.choices(symbols[: i + 1], k=olds)) for i, s in enumerate(symbols))


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond `n_bytes`, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def naive_entry(text: str, newline: str | None) -> dict[str, bytes]:
    """The files of an entry as their format says; `newline` in place of the newline, which documents have anyway."""
    if newline is not None:
        text = text.replace("\n", newline)
    index = {symbol: number for number, symbol in enumerate(sorted(set(text + (newline or ""))))}
    width = 1 if len(index) <= 2**8 else 2 if len(index) <= 2**16 else 4
    tokenizer = {"name": "char", "symbols": "".join(index), "terminator": newline or "\n"}
    return {
        "ids.bin": b"".join(index[symbol].to_bytes(width, sys.byteorder) for symbol in text),
        "entry.json": json.dumps({"n": len(text), "tokenizer": tokenizer}).encode(),
    }


def written_entry(cache: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in entry(cache).iterdir()}
    description = json.loads(files["entry.json"])
    assert description.pop("key") == entry(cache).name
    return {**files, "entry.json": json.dumps(description).encode()}


@settings(max_examples=200, deadline=None)
@given(
    text=st.one_of(growing(), TEXT),
    terminator=st.sampled_from([None, "\n", ".", "\0", "é", "😀"]),
    chunk_bytes=st.integers(1, 40),
)
@example("".join(map(chr, range(600, 30, -1))), None, 1)  # every piece has a new first character
@example("".join(map(chr, range(256))) * 2 + "\u0100", None, 1)  # the last one is too many for a byte
@example("".join(map(chr, range(0x100, 0x200))) + "zyxwv" * 9, None, 3)  # ASCII after 256 others
@example("".join(map(chr, range(0x100, 0x1FF))) + "a\nba", None, 3)  # the 256th id is that of "a"
@example("no newline", ".", 1)
def test_the_entry_is_the_same_whenever_its_characters_come(text, terminator, chunk_bytes):
    documents: dict[str, object] = {} if terminator is None else {"documents": True, "terminator": terminator}
    if terminator not in (None, "\n"):
        text = text.replace(terminator, "") or "a"
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, GPTEXP_CACHE=f"{folder}/cache"):
        encode(text, Path(folder), chunk_bytes, **documents)
        assert written_entry(Path(folder, "cache")) == naive_entry(text, terminator)


def test_ids_of_four_bytes(tmp_path, cache):
    text = "".join(chr(code) for code in reversed(range(2**16 + 2**12)) if not 0xD800 <= code < 0xE000)
    encode(text, tmp_path, 50_000)
    assert written_entry(cache) == naive_entry(text, None)


def test_256_symbols_fit_a_byte(tmp_path):
    text = "".join(map(chr, range(256)))
    assert encode(text, tmp_path).ids.dtype == np.uint8
    assert encode(text + "€", tmp_path).ids.dtype == np.uint16


def test_ids_cannot_be_written(tmp_path):
    ids = encode("abc", tmp_path).ids
    assert isinstance(ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_line_ends_are_kept(tmp_path):
    assert encode("a\r\nb\rc\n", tmp_path).tokenizer.to_dict()["symbols"] == "\n\rabc"


def test_documents_have_the_terminator_for_the_newline(tmp_path):
    encoded = encode("ba\nab\n", tmp_path, documents=True, terminator=".")
    assert encoded.ids.tolist() == [2, 1, 0, 1, 2, 0]
    assert encoded.tokenizer.to_dict() == {"name": "char", "symbols": ".ab", "terminator": "."}
    assert encoded.documents


def test_terminator_that_occurs_in_the_text(tmp_path):
    with pytest.raises(UserError, match=r"^data.terminator='\.': occurs in "):
        encode("a.b\nc", tmp_path, documents=True, terminator=".")


def test_fallback_from_documents_is_encoded_as_running_text():
    config = DataConfig(name="names", documents=True, terminator=".")
    encoded = encode_corpus(find_corpus(config), config)  # the network is out of reach
    assert not encoded.documents
    assert {"\n", "."} <= set(encoded.tokenizer.to_dict()["symbols"])


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
@pytest.mark.parametrize(
    ("data", "offset"),
    [(b"abc\xff", 3), (b"ab\xc3", 2), (b"\xe4\xb8\xad\xe4\xb8a", 3), (b"caf\xe9 noir", 3), (b"a\x80", 1)],
)
@pytest.mark.parametrize("chunk_bytes", [1, 4, 2**20])
def test_not_utf8(data, offset, tokenizer, chunk_bytes, tmp_path):
    with pytest.raises(UserError) as caught:
        encode(data, tmp_path, chunk_bytes, tokenizer=tokenizer)
    path = tmp_path / "text.txt"
    [problem] = caught.value.problems
    assert problem.startswith(f"data.path={path}: not UTF-8, byte 0x{data[offset]:02x} at offset {offset};")


def entry(cache: Path) -> Path:
    [found] = [path for path in (cache / "encoded").iterdir() if path.is_dir()]
    return found


def damage_length(folder: Path) -> None:
    (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-1])


def damage_key(folder: Path) -> None:
    written = json.loads((folder / "entry.json").read_text())
    (folder / "entry.json").write_text(json.dumps({**written, "key": "another"}))


def damage_description(folder: Path) -> None:
    (folder / "entry.json").write_text("[1, 2")


def damage_tokenizer(folder: Path) -> None:
    written = json.loads((folder / "entry.json").read_text())
    (folder / "entry.json").write_text(json.dumps({**written, "tokenizer": {"name": "char"}}))


@pytest.mark.parametrize("damage", [damage_length, damage_key, damage_description, damage_tokenizer])
def test_damaged_entry_is_made_again(damage, tmp_path, cache):
    first = encode("hello", tmp_path)
    good = {path.name: path.read_bytes() for path in entry(cache).iterdir()}
    damage(entry(cache))
    again = encode("hello", tmp_path)
    assert (again.ids.tolist(), again.fingerprint) == ([1, 0, 2, 2, 3], first.fingerprint)
    assert {path.name: path.read_bytes() for path in entry(cache).iterdir()} == good


def test_good_entry_is_reused_and_leftovers_go(tmp_path, cache):
    first = encode("hello", tmp_path)
    config = DataConfig(name="file", path=str(tmp_path / "text.txt"))
    corpus = find_corpus(config)
    corpus.path.unlink()  # so the entry must do
    assert encode_corpus(corpus, config).fingerprint == first.fingerprint
    leftover = entry(cache) / ".ids.bin.part"
    leftover.touch()
    damage_length(entry(cache))
    encode("hello", tmp_path)
    assert sorted(path.name for path in entry(cache).iterdir()) == ["entry.json", "ids.bin"]


def test_file_that_changes_meanwhile(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc")
    config = DataConfig(name="file", path=str(path))
    corpus = find_corpus(config)
    path.write_text("abd")
    with pytest.raises(UserError, match="changed while it was being read"):
        encode_corpus(corpus, config)


@pytest.mark.parametrize(("tokenizer", "reads"), [("char", 1), ("char", 6), ("byte", 1)])  # characters: twice through
@pytest.mark.parametrize("late", ["a", "z", "中", "more", ""])
def test_file_that_changes_halfway(late, tokenizer, reads, tmp_path, cache):
    path = tmp_path / "text.txt"
    text = "abc\n" * 20_000
    path.write_text(text)
    config = DataConfig(name="file", path=str(path), tokenizer=tokenizer)
    corpus = find_corpus(config)
    done = []

    class Changing(io.FileIO):
        def read(self, *size: int) -> bytes:
            piece = super().read(*size)
            done.append(piece)
            if len(done) == reads:
                path.write_text(text * 2 if late == "more" else text[: -len(late)] + late, encoding="utf-8")
            return piece

    def opened(file, *mode):
        return Changing(file) if file == path else open(file, *mode)

    with (
        mock.patch.object(module, "open", opened, create=True),
        pytest.raises(UserError, match="changed while it was being read"),
    ):
        encode_corpus(corpus, config, chunk_bytes=20_000)
    assert list(entry(cache).iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("GPTEXP_CACHE", str(tmp_path / "a file" / "cache"))
    with pytest.raises(UserError, match=r"^GPTEXP_CACHE=.*: cannot be written"):
        encode("hello", tmp_path)


@pytest.mark.parametrize("room", [0, 5, 10, 11, 50, 100])
def test_disk_that_is_full(room, tmp_path, cache):
    text = "".join(map(chr, range(300, 290, -1))) + "a"  # 11 ids of a byte
    path = tmp_path / "text.txt"
    path.write_text(text)
    config = DataConfig(name="file", path=str(path))
    corpus = find_corpus(config)
    with room_for(room), pytest.raises(UserError) as caught:
        encode_corpus(corpus, config, chunk_bytes=1)
    [problem] = caught.value.problems
    assert problem.startswith(f"GPTEXP_CACHE={cache}: cannot be written (File too large)")
    assert [path.name for path in entry(cache).iterdir()] == (["ids.bin"] if room >= 11 else [])
    encode_corpus(corpus, config)
    assert written_entry(cache) == naive_entry(text, None)


@pytest.mark.parametrize("wrong", [b"\xff", b"."])
def test_mistake_halfway_leaves_nothing(wrong, tmp_path, cache):
    with pytest.raises(UserError):
        encode(b"abc\n" * 100 + wrong, tmp_path, 10, documents=True, terminator=".")
    assert list(entry(cache).iterdir()) == []


def test_two_processes_at_once_encode_once(tmp_path, cache):
    (tmp_path / "text.txt").write_text("To be, or not to be — that is the question.\n" * 20_000)
    code = """
import hashlib, sys
from gptexp.data.corpora import find_corpus
from gptexp.data.encoded import encode_corpus
from gptexp.data.settings import DataConfig
def count(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".part") and "ids.bin" in str(arguments[0]):
        open("builds", "a").write("x")
sys.addaudithook(count)
config = DataConfig(name="file", path="text.txt")
corpus = find_corpus(config)
print("ready", flush=True)
sys.stdin.readline()
result = encode_corpus(corpus, config)
print(result.fingerprint, hashlib.sha256(result.ids.tobytes()).hexdigest())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n")[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert (tmp_path / "builds").read_text() == "x"


def test_real_corpora(real_file, monkeypatch):
    monkeypatch.setenv("GPTEXP_DATA", str(real_file("names.txt").parent))
    shakespeare = DataConfig()
    encoded = encode_corpus(find_corpus(shakespeare), shakespeare)
    assert (len(encoded.ids), encoded.tokenizer.vocab_size) == (1_115_394, 65)
    assert encoded.tokenizer.encode("hii there").tolist() == [46, 47, 47, 1, 58, 46, 43, 56, 43]  # as in the lecture
    text = encoded.tokenizer.decode(encoded.ids).encode()
    assert hashlib.sha256(text).hexdigest() == find_corpus(shakespeare).sha256
    names = DataConfig(name="names", documents=True, terminator=".")
    encoded = encode_corpus(find_corpus(names), names)
    assert encoded.tokenizer.to_dict()["symbols"] == ".abcdefghijklmnopqrstuvwxyz"
    assert encoded.tokenizer.decode(encoded.ids[:5]) == "emma."
