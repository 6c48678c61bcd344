"""The site's pages: their settings, pictures and navigation, and the commands of the pages of results, cut short."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY, more

DOCS = REPOSITORY / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
DRAWN = {"norms", "rmsnorm", "heads", "attention_scale", "warmup", "batchnorm", "arithmetic", "ladder",
         "fast", "tokenizers", "features"}  # by sweeps
SHORT = ["max_steps=12", "eval_interval=6", "eval_windows=2", "seed=1,2", "logger=none", "hardware=cpu",
         "schedule.warmup_steps=1", "sample_tokens=0"]  # fmt: skip


def test_the_page_of_settings_is_what_the_program_says(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()  # in a process of its own, as a test may have registered more components in this one
    subprocess.run([sys.executable, "-m", "gptexp.config.reference"], cwd=tmp_path, check=True)
    assert PAGES["settings"] == (tmp_path / "docs" / "settings.md").read_text(), "run python -m gptexp.config.reference"
    assert not re.findall(r".*\bal\. \|", PAGES["settings"])  # a sentence ends after the year


def test_every_page_is_in_the_navigation_and_every_picture_in_both_themes_in_a_page() -> None:
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    assert sorted(re.findall(r"(\w+)\.md", str(site["nav"]))) == sorted(PAGES)
    assert site["theme"]["font"] is False  # which a server would have to give
    shown = re.findall(r"\]\(figures/(\S+-(\w+)\.svg)#only-(\w+)\)", "\n".join(PAGES.values()))
    assert all(theme == mode for _, theme, mode in shown)
    assert {path.name for path in (DOCS / "figures").iterdir()} == {name for name, *_ in shown}
    assert {name.replace("-light", "-dark") for name, *_ in shown} <= {name for name, *_ in shown}


def test_the_pages_of_results_say_what_was_run_and_found() -> None:
    told = subprocess.run([sys.executable, DOCS / "known_results.py"], check=False, capture_output=True, text=True)
    for name in DRAWN:
        assert re.search(rf"\b{name}\b", told.stderr)
        assert f"$ python docs/known_results.py {name} " in PAGES[name]
        assert "**Outcome**" in PAGES[name]


@pytest.mark.parametrize("printed", re.findall(r"^\$ (.+\n(?:error: .+\n)+)", "\n".join(PAGES.values()), re.MULTILINE))
def test_the_printed_mistakes_are_the_real_ones(printed: str, tmp_path: Path) -> None:
    line, _, mistakes = printed.partition("\n")
    words = [sys.executable, *shlex.split(line)[1:]]
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, mistakes)


@pytest.mark.slow
@pytest.mark.parametrize("page", [name if name == "heads" else more(name) for name in sorted(DRAWN)])
def test_the_commands_of_a_page(
    page: str, command: Callable[..., int], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTEXP_DATA", "")
    printed = [shlex.split(line) for line in re.findall(r"^\$ (.+)$", PAGES[page], flags=re.MULTILINE)]
    (draw,) = (words for words in printed if words[1] == "docs/known_results.py")
    for words in printed[: printed.index(draw)]:
        if words[2] != "gptexp.train" or "-m" not in words[3:]:
            continue
        short = [s for s in SHORT if page != "warmup" or not s.startswith(("schedule", "max_steps"))]
        short += ["max_steps=2"] if page == "warmup" else []
        arguments = [word for word in words[3:] if not word.startswith(("seed=", "hydra/launcher="))]
        own = {"arithmetic": [], "tokenizers": ["data=pydocs"]}  # a small text has too few pairs
        text = own.get(page, ["data=file", f"data.path={corpus}"])
        assert command(*arguments, *short, *text) == 0
    (tmp_path / "docs").mkdir()  # so that the repository's own figures stay as they are
    shutil.copy(DOCS / "known_results.py", tmp_path / "docs")
    out = subprocess.run([sys.executable, *draw[1:]], check=False, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    for header in re.findall(r"^(\|.+)\n\|---", out.stdout, flags=re.MULTILINE):
        assert header in PAGES[page]  # the page's tables have the columns that the command prints
    for theme in ("light", "dark"):
        assert (tmp_path / "docs" / "figures" / f"{page}-{theme}.svg").read_text().rstrip().endswith("</svg>")
