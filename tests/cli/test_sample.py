"""Sampling from a run at the command line."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp import sample
from gptexp.runs.run import Run
from tests.conftest import TINY

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from gptexp import train

    folder = tmp_path_factory.mktemp("sample") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gptexp", *TINY, f"data.path={corpus}", f"hydra.run.dir={folder}"])
        train.main()
    return Run.open(folder)


@pytest.fixture
def ask(command: Callable[..., int], run: Run, capfd: pytest.CaptureFixture[str]) -> Ask:
    def ask(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = command(f"run={run.path}", *arguments, main=sample.main)
        return code, *capfd.readouterr()

    return ask


def test_samples_continue_their_prompts(ask: Ask) -> None:
    code, out, _ = ask("prompt=The question", "prompt=To be", "num_samples=2", "max_new_tokens=30")
    assert code == 0
    texts = [part.split("---\n", 1)[1] for part in out.split("--- sample ")[1:]]
    assert [text[:5] for text in texts] == ["The q", "The q", "To be", "To be"]
    assert texts[0] != texts[1]
    assert len(texts[0].rstrip("\n")) <= len("The question") + 30


def test_the_same_seed_gives_the_same_text(ask: Ask) -> None:
    one, again, other = ask("prompt=To", "seed=1"), ask("prompt=To", "seed=1"), ask("prompt=To", "seed=2")
    assert one == again != other
    assert ask("prompt=To", "seed=1", "temperature=0") == ask("prompt=To", "seed=2", "top_k=1")


def test_prompts_from_files(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("To be\nor not")
    assert ask(f"prompt_file={file}")[1].startswith("To be\nor not")
    lines = ask(f"prompt_file={file}", "prompt_per_line=true")[1]
    assert "--- sample 2 of 2 ---\nor not" in lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the arrows")))
    assert ask("prompt_file=-")[1].startswith("the arrows")


def test_a_named_checkpoint_is_sampled(
    run: Run, command: Callable[..., int], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    last = run.checkpoint("last")
    moved = last.rename(tmp_path / "last.ckpt")
    capfd.readouterr()
    assert command(str(last), main=sample.main) == 2
    assert f"there is no checkpoint {last}" in capfd.readouterr().err
    assert command(str(last), "checkpoint=best", main=sample.main) == 0
    moved.rename(last)


def test_stop(ask: Ask) -> None:
    out = ask("prompt=To be", "stop=e", "max_new_tokens=500")[1].rstrip("\n")
    assert out.endswith("e")
    assert out.count("e") == "To be".count("e") + 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prompt=To be §"], "prompt character '§' (U+00A7) at position 6 is not in the vocabulary of"),
        (["promt=To"], "promt=To: unknown key; did you mean prompt?"),
        (["temperature=-1"], "temperature=-1: must be a number of at least 0"),
        (["top_p=0"], "top_p=0: must be a number greater than 0 and at most 1 or null"),
        (["num_samples=two"], "num_samples=two: must be an integer of at least 1"),
        (["checkpoint=newest"], "checkpoint=newest: must be one of best, last"),
        (["prompt="], "prompt=: is empty"),
        (["prompt_file=nowhere"], "prompt_file=nowhere: cannot be read (No such file or directory)"),
        (["prompt_per_line=true"], "prompt_per_line=true: has no effect without prompt_file"),
        (["To be"], "To be: cannot be read as a setting; the run directory is "),
    ],
)
def test_mistakes(arguments: list[str], line: str, ask: Ask) -> None:
    code, out, err = ask(*arguments)
    assert code == 2
    assert err.startswith(f"error: {line}")
    assert len(err.splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize("damage", ["missing", "cut", "foreign"])
def test_bad_checkpoints(damage: str, ask: Ask, run: Run) -> None:
    path = run.checkpoint("best")
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"GIF89a")
    code, _, err = ask("prompt=To")
    path.write_bytes(content)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "best.ckpt" in err


def test_not_a_run(command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(f"run={tmp_path}", main=sample.main) == 2
    assert command("prompt=To", main=sample.main) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"error: run={tmp_path}: is not a run directory (it holds no run.json and config.yaml)"
    assert lines[1] == "error: run: is missing; give the run directory as run=DIR"


class Terminal(io.StringIO):
    """Standard output of a terminal, which keeps what it holds each time that it is flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = [""]

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        if self.getvalue() != self.seen[-1]:
            self.seen.append(self.getvalue())


def test_a_terminal_sees_the_text_as_it_grows(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the end the text that a file gets."""
    arguments = ["prompt=To be", "max_new_tokens=60"]
    plain, terminal = ask(*arguments)[1], Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert ask(*arguments)[0] == 0
    assert [len(text) for text in terminal.seen] == [0, *range(len("To be"), len("To be") + 61)]
    assert terminal.getvalue() == plain
