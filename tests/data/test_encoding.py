"""The encoded corpus on disk: its format, damage to it, mistakes in the text, and several processes at once."""

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptexp.config.sections import DataConfig
from gptexp.data import files
from gptexp.data.corpora import Corpus, find_corpus
from gptexp.data.encoding import Encoded, encode_corpus, read_corpus
from gptexp.errors import UserError
from gptexp.tasks.text import Lines, Text

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def written(text: str | bytes, folder: Path) -> Corpus:
    path = folder / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return find_corpus(DataConfig(name="file", path=str(path)))


def encode(
    text: str | bytes, folder: Path, chunk_bytes: int = 2**20, tokenizer: str = "char", terminator: str | None = None
) -> Encoded:
    task = Text() if terminator is None else Lines(terminator=terminator)
    return encode_corpus(written(text, folder), DataConfig(tokenizer=tokenizer), task, chunk_bytes=chunk_bytes)


def entry(cache: Path) -> Path:
    [found] = [path for path in (cache / "encoded").iterdir() if path.is_dir()]
    return found


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


@settings(max_examples=150)
@given(TEXT, st.sampled_from([None, "\n", ".", "\0", "é", "😀"]), st.integers(1, 40))
@example("aé\r\n中😀", None, 1)
@example("".join(map(chr, range(600, 30, -1))), None, 1)  # every piece has a new first character
@example("".join(map(chr, range(256))), None, 9)  # just fit into a byte
@example("".join(map(chr, range(256))) * 2 + "\u0100", None, 1)  # the last one is too many for a byte
@example("".join(map(chr, range(0x100, 0x1FF))) + "a\nba", None, 3)  # the 256th id is that of "a"
@example("no newline", ".", 1)
def test_an_entry_is_as_its_format_says(text: str, terminator: str | None, chunk_bytes: int) -> None:
    if terminator not in (None, "\n"):
        text = text.replace(terminator, "") or "a"
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, GPTEXP_CACHE=f"{folder}/cache"):
        chars = encode(text, Path(folder), chunk_bytes, terminator=terminator)
        assert written_entry(Path(folder, "cache")) == naive_entry(text, terminator)
        in_bytes = encode(text, Path(folder), chunk_bytes, tokenizer="byte")
        assert in_bytes.ids.tobytes() == text.encode()
        assert in_bytes.fingerprint != chars.fingerprint


def test_ids_of_four_bytes_that_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    text = "".join(chr(code) for code in reversed(range(2**16 + 2**12)) if not 0xD800 <= code < 0xE000)
    ids = encode(text, tmp_path, 50_000).ids
    assert written_entry(cache) == naive_entry(text, None)
    assert isinstance(ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_terminator_that_occurs_in_the_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task.terminator='\.': occurs in "):
        encode("a.b\nc", tmp_path, terminator=".")


def test_fallback_from_documents_is_encoded_as_running_text() -> None:
    reading = read_corpus(DataConfig(name="names"), Lines())  # the network is out of reach
    assert (reading.data.name, reading.task) == ("pydocs", Text())
    assert {"\n", "."} <= set(reading.encoded.tokenizer.to_dict()["symbols"])


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
@pytest.mark.parametrize(
    ("data", "offset"),
    [(b"abc\xff", 3), (b"ab\xc3", 2), (b"\xe4\xb8\xad\xe4\xb8a", 3), (b"caf\xe9 noir", 3), (b"a\x80", 1)],
)
def test_not_utf8(data: bytes, offset: int, tokenizer: str, tmp_path: Path) -> None:
    for chunk_bytes in (1, 4, 2**20):
        with pytest.raises(UserError) as caught:
            encode(data, tmp_path, chunk_bytes, tokenizer=tokenizer)
        [problem] = caught.value.problems
        where = f"not UTF-8, byte 0x{data[offset]:02x} at offset {offset};"
        assert problem.startswith(f"data.path={tmp_path / 'text.txt'}: {where}")


@pytest.mark.parametrize(
    "damage",
    [
        {"ids.bin": lambda content: content[:-1]},
        {"entry.json": lambda content: b"[1, 2"},
        {"entry.json": lambda content: json.dumps({**json.loads(content), "key": "another"}).encode()},
        {"entry.json": lambda content: json.dumps({**json.loads(content), "tokenizer": {"name": "char"}}).encode()},
    ],
)
def test_damaged_entry_is_made_again(damage: dict[str, Callable[[bytes], bytes]], tmp_path: Path, cache: Path) -> None:
    first = encode("hello", tmp_path)
    good = {path.name: path.read_bytes() for path in entry(cache).iterdir()}
    for name, change in damage.items():
        (entry(cache) / name).write_bytes(change(good[name]))
    (entry(cache) / ".ids.bin.part").touch()  # of a process that was killed
    again = encode("hello", tmp_path)
    assert (again.ids.tolist(), again.fingerprint) == ([1, 0, 2, 2, 3], first.fingerprint)
    assert {path.name: path.read_bytes() for path in entry(cache).iterdir()} == good


def test_good_entry_is_reused(tmp_path: Path) -> None:
    first, corpus = encode("hello", tmp_path), written("hello", tmp_path)
    corpus.path.unlink()  # so the entry must do
    assert encode_corpus(corpus).fingerprint == first.fingerprint


@pytest.mark.parametrize(("tokenizer", "reads"), [("char", 0), ("char", 1), ("char", 4), ("byte", 1)])
@pytest.mark.parametrize("late", ["a", "中", "more", ""])
def test_file_that_changes_meanwhile(late: str, tokenizer: str, reads: int, tmp_path: Path, cache: Path) -> None:
    """Before the first read, or after some; the characters are read twice through, in three reads each."""
    text = "abc\n" * 20_000
    corpus, done = written(text, tmp_path), []

    def change() -> None:
        corpus.path.write_text(text * 2 if late == "more" else text[: -len(late)] + late, encoding="utf-8")

    class Changing(io.FileIO):
        def readinto(self, buffer: bytearray) -> int:
            done.append(super().readinto(buffer))
            if len(done) == reads:
                change()
            return done[-1]

    if not reads:
        change()
    with (
        mock.patch.object(files, "open", lambda file, *mode, **options: Changing(file), create=True),
        pytest.raises(UserError, match="changed while it was being read"),
    ):
        encode_corpus(corpus, DataConfig(tokenizer=tokenizer), chunk_bytes=20_000)
    assert list(entry(cache).iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("GPTEXP_CACHE", str(tmp_path / "a file" / "cache"))
    with pytest.raises(UserError, match=r"^GPTEXP_CACHE=.*: cannot be written"):
        encode("hello", tmp_path)


@pytest.mark.parametrize("room", [0, 5, 11, 100])
def test_disk_that_is_full(room: int, tmp_path: Path, cache: Path) -> None:
    text = "".join(map(chr, range(300, 290, -1))) + "a"  # 11 ids of a byte
    corpus, (soft, hard) = written(text, tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # files cannot grow beyond it
    try:
        with pytest.raises(UserError) as caught:
            encode_corpus(corpus, chunk_bytes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    [problem] = caught.value.problems
    assert problem.startswith(f"GPTEXP_CACHE={cache}: cannot be written (File too large)")
    assert [path.name for path in entry(cache).iterdir()] == (["ids.bin"] if room >= 11 else [])
    encode_corpus(corpus)
    assert written_entry(cache) == naive_entry(text, None)


@pytest.mark.parametrize("wrong", [b"\xff", b"."])
def test_mistake_halfway_leaves_nothing(wrong: bytes, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError):
        encode(b"abc\n" * 100 + wrong, tmp_path, 10, terminator=".")
    assert list(entry(cache).iterdir()) == []


PROGRAM = """
import hashlib, sys
from gptexp.data.corpora import find_corpus
from gptexp.data.encoding import encode_corpus
from gptexp.config.sections import DataConfig
def count(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".part") and "ids.bin" in str(arguments[0]):
        open("builds", "a").write("x")
sys.addaudithook(count)
corpus = find_corpus(DataConfig(name="file", path="text.txt"))
print("ready", flush=True)
sys.stdin.readline()
result = encode_corpus(corpus)
print(result.fingerprint, hashlib.sha256(result.ids.tobytes()).hexdigest())
"""


def test_several_processes_at_once_encode_once(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be — that is the question.\n" * 20_000)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n")[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert (tmp_path / "builds").read_text() == "x"


def test_real_corpora(real_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTEXP_DATA", str(real_file("names.txt").parent))
    shakespeare = DataConfig()
    encoded = read_corpus(shakespeare, Text()).encoded
    assert (len(encoded.ids), encoded.tokenizer.vocab_size) == (1_115_394, 65)
    assert encoded.tokenizer.encode("hii there").tolist() == [46, 47, 47, 1, 58, 46, 43, 56, 43]  # as in the lecture
    text = encoded.tokenizer.decode(encoded.ids).encode()
    assert hashlib.sha256(text).hexdigest() == find_corpus(shakespeare).sha256
    encoded = read_corpus(DataConfig(name="names"), Lines()).encoded
    assert encoded.tokenizer.to_dict()["symbols"] == ".abcdefghijklmnopqrstuvwxyz"
    assert encoded.tokenizer.decode(encoded.ids[:5]) == "emma."
