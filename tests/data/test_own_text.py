"""Text of one's own: folders, patterns, compressed files, JSON lines, and a text for validation."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptexp.data.batches import IGNORED
from gptexp.data.datamodule import CharDataModule
from gptexp.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTEXP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind, and some that are not read."""
    root = tmp_path / "own"
    (root / "deep" / ".git").mkdir(parents=True)
    (root / "b.md").write_bytes("zwei\r\nÜ".encode())
    (root / "a.txt").write_text("one\n")
    (root / "deep" / "c.py.gz").write_bytes(gzip.compress(b"three = 3"))
    lines = [{"text": "four\nfive", "n": 1}, {"text": "six"}]
    (root / "deep" / "d.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for other in ("e.csv", ".hidden.txt", "deep/.git/f.txt"):
        (root / other).write_text("never read")
    (root / "empty.txt").touch()
    return root


def read(path: Any, task: str = "text", block_size: int = 2, **data: Any) -> CharDataModule:
    module = CharDataModule({"name": "file", "path": str(path), **data}, {"name": task}, block_size=block_size)
    module.setup()
    return module


def text_of(data: CharDataModule) -> str:
    return data.encoded.tokenizer.decode(data.encoded.ids)


WHOLE = "one\nzwei\r\nÜ\nthree = 3\nfour\nfive\nsix\n"


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_folder(folder: Path, tokenizer: str) -> None:
    assert text_of(read(folder, tokenizer=tokenizer)) == WHOLE


def test_the_summary(folder: Path) -> None:
    data = read(folder / "*.*", block_size=1)
    assert data.summary() == ("14 symbols, the rarest '\\r' (1), ' ' (1), 'a' (1); 19 tokens to train on, 3 for "
                              "validation")  # fmt: skip


def test_patterns(folder: Path) -> None:
    assert text_of(read(folder / "*.*", block_size=1)) == "one\nzwei\r\nÜ\nnever read\n"  # what is named is read
    assert text_of(read(folder / "**" / "*.[pj]*", block_size=1)) == WHOLE[WHOLE.index("three") :]


def test_one_file(folder: Path) -> None:
    """As it is: no newline is added."""
    assert text_of(read(folder / "b.md", block_size=1)) == "zwei\r\nÜ"
    assert text_of(read(folder / "deep" / "c.py.gz", block_size=1)) == "three = 3"
    assert text_of(read(folder / "e.csv", block_size=1)) == "never read"


def test_the_key_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "wrong", "body": "right"}\n{"body": "too"}\n'))
    assert text_of(read(path, field="body")) == "right\ntoo\n"


def test_what_is_read_is_known_by_its_bytes(folder: Path) -> None:
    before = read(folder).encoded
    assert read(folder).encoded.fingerprint == before.fingerprint
    (folder / "a.txt").rename(folder / "a2.txt")
    assert read(folder).encoded.fingerprint == before.fingerprint
    (folder / "deep" / "c.py.gz").write_bytes(gzip.compress(b"three = 4"))
    assert read(folder).encoded.fingerprint != before.fingerprint


def test_a_text_of_its_own_for_validation(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("size\nsix\n")
    data = read(folder, val_path=str(tmp_path / "val.txt"))
    y = data.val.rows(range(data.val.n_rows)).y
    assert data.encoded.tokenizer.decode(y[y != IGNORED]) == "size\nsix\n"
    trained = {"".join(data.encoded.tokenizer.decode(row)) for row in data.train.train_batch(0, 0, 500).y}
    assert all(part in WHOLE for part in trained)
    lines = read(folder, "documents", 16, val_path=str(tmp_path / "val.txt"))
    rows = lines.val.rows(range(lines.val.n_rows)).y
    assert [lines.encoded.tokenizer.decode(row[row != IGNORED]) for row in rows] == ["size\n", "six\n"]
    assert lines.train.n_rows == 7


def test_problems_of_their_own_for_validation(tmp_path: Path) -> None:
    def written(name: str, prompts: str) -> str:
        path = tmp_path / name
        path.write_text("".join(f'{{"prompt": "{p}", "answer": "{ord(p)}"}}\n' for p in prompts))
        return str(path)

    data = read(written("train.jsonl", "abcd"), "problems", 8, val_path=written("val.jsonl", "xy"))
    assert (data.train.n_rows, data.val.n_rows) == (4, 2)
    with pytest.raises(UserError, match=r"1 of its prompts, such as 'd', are in data.path=.*, too"):
        read(tmp_path / "train.jsonl", "problems", 8, val_path=written("val.jsonl", "dx"))


@pytest.mark.parametrize(("name", "content", "settings", "problem"), [
    ("a.txt", b"abc", {"field": "body"}, "data.field=body: has no effect without a .jsonl file in data.path={path}"),
    ("a.jsonl", b"\n", {}, "data.path={path}: line 1 is empty; allowed: a JSON object in each line"),
    ("a.jsonl", b'{"text": "a"}\nb', {}, "data.path={path}: line 2 is not JSON; allowed: a JSON object in each line"),
    ("a.jsonl", b'{"body": "a"}', {}, 'data.path={path}: line 1 has no text "text"; allowed: the name of another key, '
                                      "as data.field=KEY"),
    ("a.jsonl", b"[1]", {}, 'data.path={path}: line 1 has no text "text"; allowed: the name of another key, as '
                            "data.field=KEY"),
    ("a.txt.gz", b"abc", {}, "data.path={path}: cannot be read (Not a gzipped file (b'ab'))"),
    ("a.txt.gz", gzip.compress(b"abc" * 100, mtime=0)[:-9], {}, "data.path={path}: ends too early; allowed: a whole "
                                                                "gzip file"),
    ("a.txt", b"ab\xff", {}, "data.path={path}: not UTF-8, byte 0xff at offset 2; allowed: a UTF-8 text file"),
    ("a.txt", b"abc", {"val_path": "{path}"}, "data.val_path={path}: {path} is in data.path={path}, too; allowed: a "
                                              "text of its own"),
    ("a.txt", b"abc", {"val_path": "{path}.no*"}, "data.val_path={path}.no*: no file has such a name; allowed: a UTF-8 "
                                                  "text file that is not empty, or a folder or pattern of them"),
], ids=str)  # fmt: skip
def test_mistakes(name: str, content: bytes, settings: dict[str, str], problem: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path, **{key: value.format(path=path) for key, value in settings.items()})
    assert caught.value.problems == [problem.format(path=path)]


def test_two_texts_do_not_run_together(tmp_path: Path) -> None:
    """A file that lacks its last newline gets one."""
    for name, text in (("a.txt", "first"), ("b.txt", "second"), ("val.txt", "third")):
        (tmp_path / name).write_text(text)
    data = read(tmp_path / "?.txt", "documents", 8, val_path=str(tmp_path / "val.txt"))
    rows = data.train.rows(np.arange(data.train.n_rows))
    assert sorted(data.encoded.tokenizer.decode(row[row != IGNORED]) for row in rows.y) == ["first\n", "second\n"]
