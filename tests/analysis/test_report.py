"""The files of a comparison: tables that parse back, a page that loads nothing and reads well in a real browser."""

import csv
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gptexp.analysis.factors import is_numeric
from gptexp.analysis.figures import COLOURS, band, chosen, draw
from gptexp.analysis.report import write_report
from gptexp.analysis.study import Study
from gptexp.analysis.tables import all_tables, latex, markdown, pareto_front, reach, readable, speed_table
from gptexp.records import Table, append_sample
from tests.analysis.conftest import Write

Build = Callable[..., Study]


@pytest.fixture
def grid(write: Write, study: Build) -> Callable[[], Study]:
    """Norms by placements by heads, six seeds, one run diverged, with samples and diagnostics."""

    def build() -> Study:
        draw_ = np.random.default_rng(0)
        for n, norm in enumerate(("layernorm", "rmsnorm", "batchnorm")):
            for p, placement in enumerate(("pre", "post")):
                for h, heads in enumerate((2, 4)):
                    for seed in range(6):
                        end = 2 + 0.03 * n + 0.1 * p - 0.01 * h + float(draw_.normal(0, 0.005))
                        lost = (norm, placement, heads, seed) == ("batchnorm", "post", 4, 5)
                        run = write(
                            [4.0, math.nan] if lost else [4.0, end + 0.3, end + 0.1, end], seed, norm, placement,
                            model={"n_head": heads}, name=f"{norm}-{placement}-h{heads}-s{seed}",
                            status="diverged" if lost else "done",
                        )  # fmt: skip
                        append_sample(run.samples_path, 3, f"<script>alert({seed})</script> & so")
                        rows = Table(run.diagnostics_path, ["step", "layer", "quantity", "value"])
                        for step in (0, 3):
                            for layer in ("blocks.0", "blocks.1"):
                                rows.append({"step": step, "layer": layer, "quantity": "grad_norm", "value": 0.5 + n})
                        rows.close()
        return study()

    return build


class Tags(HTMLParser):
    """Checks that tags close in order, and keeps their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(text: str) -> Tags:
    page = Tags()
    page.feed(text)
    assert page.open == []
    return page


def test_all_files_are_there(grid: Callable[[], Study], tmp_path: Path) -> None:
    page = write_report(grid(), tmp_path / "report", "a <title>", "python -m gptexp.compare x")
    text = page.read_text()
    names = {"forest", "curves_step", "curves_tokens", "curves_seconds", "heat_map", "pareto", "diagnostics"}
    assert {p.name for p in (page.parent / "figures").iterdir()} == {f"{n}.{e}" for n in names for e in ("png", "svg")}
    tables = {f"{n}.{e}" for n in ("variants", "comparisons", "runs", "speed") for e in ("csv", "md", "tex")}
    assert {p.name for p in (page.parent / "tables").iterdir()} == tables
    for path in page.parent.rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    tags = parse(text)
    assert len(text.encode()) < 2_000_000
    assert sum(tag == "svg" for tag, _ in tags.seen) == len(names)
    assert "a &lt;title&gt;" in text
    assert "<script" not in text
    assert "&lt;script&gt;alert(0)&lt;/script&gt; &amp; so" in text
    assert "1 diverged" in text
    assert "The training loss of batchnorm pre h2" in text
    assert "python -m gptexp.compare x" in text
    # Nothing is loaded: the only addresses are within the page.
    links = [value for _, attrs in tags.seen for key, value in attrs.items() if key in ("href", "src", "xlink:href")]
    assert all(str(link).startswith(("#", "data:")) for link in links)
    assert not re.search(r"https?://", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    assert not re.search(r"@import|url\((?!#)", text)
    # Figures and tables say what they are to those who do not see them.
    assert all(attrs.get("aria-label") for tag, attrs in tags.seen if attrs.get("role") == "img")
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in tags.seen if tag == "th")
    identifiers = [attrs["id"] for _, attrs in tags.seen if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.slow
def test_equal_results_give_equal_bytes(grid: Callable[[], Study], tmp_path: Path) -> None:
    study = grid()
    for name in ("a", "b"):
        write_report(study, tmp_path / name, "t", "c")
    for path in (tmp_path / "a").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path


def test_csv_parses_back_to_the_same_numbers(grid: Callable[[], Study], tmp_path: Path) -> None:
    study = grid()
    write_report(study, tmp_path, "t", "c")
    for name, table in all_tables(study).items():
        back = pd.read_csv(tmp_path / "tables" / f"{name}.csv", float_precision="round_trip", dtype={"n_head": str})
        assert list(back.columns) == list(table.columns)
        for column in table.select_dtypes("float"):
            np.testing.assert_array_equal(back[column].to_numpy(), table[column].to_numpy())
    with (tmp_path / "tables" / "comparisons.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["difference"]) for r in rows] == [c.judgement.mean for c in study.comparisons]
    assert len(rows) == 11 + 2 + 1 + 1  # variants, norms, placement, heads


def test_no_table_but_speed_has_times(grid: Callable[[], Study]) -> None:
    for name, table in all_tables(grid()).items():
        assert any("seconds" in column for column in table) == (name == "speed")


def test_markdown_and_latex_are_escaped() -> None:
    table = pd.DataFrame({"a_b": ["x|y", "50 % & _"], "c": ["–", "±1"]})
    assert markdown(table) == "| a_b | c |\n| --- | --- |\n| x\\|y | – |\n| 50 % & _ | ±1 |\n"
    assert r"50 \% \& \_ & ±1 \\" in latex(table)


def test_readable_numbers() -> None:
    table = pd.DataFrame({"loss": [1.23456, math.nan], "p": [0.05, 1.0], "diverged": [0, 0], "seeds_needed": [None, 7]})
    text = readable(table.astype({"seeds_needed": "Int64"}))
    assert text.to_dict("list") == {"loss": ["1.2346", "–"], "p": ["0.0500", "1.0000"], "seeds needed": ["–", "7"]}


def test_steps_tokens_and_seconds_to_a_target(write: Write, study: Build) -> None:
    write([4.0, 3.0, 2.5, 2.0], 1)
    write([4.0, 3.0, 2.6, 2.6], 2)
    found = study()
    assert [row["step"] for row in reach(found.variants[0], 2.6)] == [2, 2]
    (row,) = speed_table(found, target=2.5).to_dict("records")
    assert (row["reached"], row["of"]) == (1, 2)
    assert (row["to_target_step"], row["to_target_tokens"], row["to_target_seconds"]) == (2, 2 * 768, 0.02)
    assert speed_table(found)["target"][0] == pytest.approx(2.3)
    assert math.isnan(speed_table(found, target=1.0)["to_target_step"][0])


def test_the_pareto_front() -> None:
    points = {"fast": (1.0, 3.0), "good": (3.0, 1.0), "between": (2.0, 2.0), "beaten": (2.5, 2.0), "twin": (1.0, 3.0)}
    assert pareto_front(points) == ["fast", "good", "between", "twin"]


def test_the_band_of_curves_on_different_steps(write: Write, study: Build) -> None:
    write([4.0, 3.0, 2.0], 1)
    write([4.0, 3.0, 2.0, 1.0], 2)
    x, mean, low, high = band(study().variants[0], "step")
    assert (x[0], x[-1]) == (0, 2)
    assert (low <= mean).all()
    assert (mean <= high).all()


def test_many_variants_and_a_numeric_factor(write: Write, study: Build) -> None:
    for rate in np.geomspace(1e-4, 1e-2, 12):
        write(2.0 + float(rate), 1, settings={"optimizer": {"learning_rate": float(rate)}}, name=f"r{rate}")
    found = study()
    assert is_numeric(found.factors[0])
    assert len(chosen(found)) == len(COLOURS)
    figures = draw(found)
    assert "sensitivity_learning_rate" in figures
    assert "heat_map" not in figures
    assert figures["sensitivity_learning_rate"].axes[0].get_xscale() == "log"


def test_a_sweep_without_a_finished_run(write: Write, study: Build, tmp_path: Path) -> None:
    write([], 1, status="running")
    write([4.0], 2, "rmsnorm", status="failed")
    text = write_report(study(), tmp_path / "report", "t", "c").read_text()
    parse(text)
    assert "No run has come to its end" in text
    assert not list((tmp_path / "report" / "figures").iterdir())


@pytest.fixture
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("there is no Chromium")


def load(browser: str, page: Path, script: str, folder: Path) -> tuple[dict[str, object], str]:
    """What a script returns when the page has been loaded in a frame of 390 pixels, and what the console says."""
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="{page.name}" style="width: 390px; height: 800px; border: 0"></iframe><pre id="out"></pre>'
        "<script>onload = () => { const d = document.getElementById('f').contentDocument, "
        f"w = d.defaultView; document.getElementById('out').textContent = JSON.stringify((() => {{ {script} }})()); }}"
        "</script>"
    )
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom",
         f"file://{frame}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (out,) = re.findall(r'<pre id="out">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    return json.loads(out), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
def test_the_page_in_a_browser(browser: str, grid: Callable[[], Study], tmp_path: Path) -> None:
    page = write_report(grid(), tmp_path / "report", "t", "c")
    script = """
        const shown = () => [...d.querySelectorAll('.curve')].filter(c => c.offsetParent).map(c => c.classList[1]);
        const before = shown();
        d.querySelector('label[for=axis-seconds]').click();
        return {
            width: d.documentElement.scrollWidth, inner: d.documentElement.clientWidth, before, after: shown(),
            drawn: [...d.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height),
            ink: w.getComputedStyle(d.querySelector('svg text')).fill,
            small: Math.min(...[...d.querySelectorAll('body *')].map(e => parseFloat(w.getComputedStyle(e).fontSize))),
            h1: d.querySelector('h1').textContent,
        };
    """
    found, console = load(browser, page, script, page.parent)
    assert found["width"] == found["inner"]  # nothing sticks out
    assert found["before"] == ["curves_step"]
    assert found["after"] == ["curves_seconds"]
    assert sum(height > 100 for height in found["drawn"]) == 5  # type: ignore[attr-defined]  two curves are hidden
    assert str(found["h1"]).startswith("Undecided")
    assert console == ""
