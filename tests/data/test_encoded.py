import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
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
    with mock.patch.object(module, "_build", side_effect=AssertionError):
        assert encode("hello", tmp_path).fingerprint == first.fingerprint
    leftover = entry(cache) / ".ids.bin.0123.part"
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
    path.write_text("ab中", encoding="utf-8")  # after the vocabulary is known: far outside its table
    with (
        mock.patch.object(module, "_vocabulary", return_value="abc"),
        pytest.raises(UserError, match="changed while it was being read"),
    ):
        encode_corpus(corpus, config)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("GPTEXP_CACHE", str(tmp_path / "a file" / "cache"))
    with pytest.raises(UserError, match=r"^GPTEXP_CACHE=.*: cannot be written"):
        encode("hello", tmp_path)


def test_full_disk(tmp_path, cache):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(module, "_write", side_effect=full), pytest.raises(UserError) as caught:
        encode("hello", tmp_path)
    [problem] = caught.value.problems
    assert problem.startswith(f"GPTEXP_CACHE={cache}: cannot be written (No space left on device)")
    assert list(entry(cache).iterdir()) == []


def test_two_processes_at_once_encode_once(tmp_path, cache):
    (tmp_path / "text.txt").write_text("To be, or not to be — that is the question.\n" * 20_000)
    code = """
import hashlib, sys
from gptexp.data import encoded
from gptexp.data.corpora import find_corpus
from gptexp.data.settings import DataConfig
build = encoded._build
def counted(*args, **kwargs):
    open("builds", "a").write("x")
    build(*args, **kwargs)
encoded._build = counted
config = DataConfig(name="file", path="text.txt")
corpus = find_corpus(config)
print("ready", flush=True)
sys.stdin.readline()
result = encoded.encode_corpus(corpus, config)
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
