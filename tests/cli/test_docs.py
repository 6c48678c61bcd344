"""The commands of the pages in docs/, cut short, draw each page's figure and print its table."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, more

PAGES = sorted(p.stem for p in (REPOSITORY / "docs").glob("*.md") if p.stem not in ("statistics", "scale"))
SHORT = ["max_steps=12", "eval_interval=6", "eval_windows=2", "seed=1,2", "logger=none", "hardware=cpu",
         "schedule.warmup_steps=1", "sample_tokens=0"]  # fmt: skip


def test_every_page_has_its_figure_and_an_experiment() -> None:
    assert PAGES == ["attention_scale", "batchnorm", "fast", "heads", "ladder", "rmsnorm", "warmup"]
    for page in PAGES:
        text = (REPOSITORY / "docs" / f"{page}.md").read_text()
        for picture in re.findall(r"\]\(([\w./]+\.png)\)", text):
            assert (REPOSITORY / "docs" / picture).exists()
        assert f"]({page}.png)" in text
        assert page == "ladder" or "**Outcome**" in text


@pytest.mark.slow
@pytest.mark.parametrize("page", [page if page in ("heads", "rmsnorm") else more(page) for page in PAGES])
def test_the_commands_of_a_page(
    page: str, command: Callable[..., int], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTEXP_DATA", "")
    text = (REPOSITORY / "docs" / f"{page}.md").read_text()
    commands = [shlex.split(c) for c in re.findall(r"^\$ (.+)$", text, flags=re.MULTILINE)]
    at = next(i for i, c in enumerate(commands) if c[1].startswith("docs/"))
    for sweep in commands[:at]:
        assert sweep[:3] == ["python", "-m", "gptexp.train"]
        short = [s for s in SHORT if page != "warmup" or not s.startswith(("schedule", "max_steps=12"))]
        short += ["max_steps=2"] if page == "warmup" else []
        short = short if "-m" in sweep[3:] else [s for s in short if not s.startswith("seed")]
        arguments = [a for a in sweep[3:] if not a.startswith("seed=")]
        assert command(*arguments, *short, "data=file", f"data.path={corpus}") == 0
    draw = commands[at]
    shutil.copy(REPOSITORY / "docs" / "known_results.py", tmp_path)
    out = subprocess.run([sys.executable, *draw[1:2], *draw[2:]], check=False, capture_output=True, text=True,
                         cwd=_with_docs(tmp_path))  # fmt: skip
    assert out.returncode == 0, out.stderr
    header = next(line for line in out.stdout.splitlines() if line.startswith("| "))
    assert header in text  # the page's table has the columns that the command prints
    assert (tmp_path / "docs" / f"{page}.png").read_bytes().startswith(b"\x89PNG")


def _with_docs(folder: Path) -> Path:
    """The folder with the script where the pages say it is; the repository's own figures stay as they are."""
    (folder / "docs").mkdir()
    (folder / "known_results.py").rename(folder / "docs" / "known_results.py")
    return folder
