"""The files of a comparison: figures that show what they say, tables that parse back, a page for a real browser."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from gptexp.analysis.collect import collect
from gptexp.analysis.figures import MOST_LINES, band, draw, plot_runs
from gptexp.analysis.report import write_report
from gptexp.analysis.study import Study, build_study
from gptexp.analysis.tables import all_tables, latex, markdown, readable, speed_table
from gptexp.runs.files import append_rows, append_sample
from tests.analysis.conftest import Write
from tests.synthetic import write_run

Build = Callable[..., Study]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Norms by placements by heads, three seeds, one run diverged, with samples and diagnostics."""
    noise, folder = np.random.default_rng(0), tmp_path_factory.mktemp("grid")
    for number in range(36):
        variant, seed = divmod(number, 3)
        norm, placement = ("layernorm", "rmsnorm", "batchnorm")[variant // 4], ("pre", "post")[variant // 2 % 2]
        end = 2 + 0.03 * (variant // 4) + 0.1 * (placement == "post") + float(noise.normal(0, 0.005))
        settings = {"model": {"norm": norm, "placement": placement, "n_head": 2 + 2 * (variant % 2)}, "seed": seed}
        lost = number == 35
        run = write_run(folder / f"{variant:02d}-s{seed}", settings, [4.0, end + 0.1, math.nan if lost else end],
                        status="diverged" if lost else "done")  # fmt: skip
        append_sample(run.samples_path, 3, f"<script>alert({seed})</script> & so")
        rows = [{"step": 3, "layer": layer, "quantity": "grad_norm", "value": 0.5 + seed}
                for layer in ("blocks.0", "blocks.1")]  # fmt: skip
        append_rows(run.diagnostics_path, list(rows[0]), rows)
    return build_study(collect([folder]))


@pytest.fixture(scope="module")
def page(grid: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(grid, tmp_path_factory.mktemp("report"), "a <title>", "python -m gptexp.compare x")


def lines(figure: Figure) -> dict[str, tuple[str, object]]:
    """Color and dashes of what is drawn, by the names in the legend."""
    (legend,) = figure.legends
    return {text.get_text(): (to_hex(line.get_color()), line.get_linestyle())
            for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}  # fmt: skip


def test_learning_curves_are_a_mean_and_a_band_per_variant(write: Write, study: Build) -> None:
    ends = {"layernorm": (2.0, 2.2, 2.1), "rmsnorm": (1.9, 2.0, 1.7)}  # the later one is the better
    for norm, by_seed in ends.items():
        for seed, end in enumerate(by_seed):
            write([9.0, 5.0, end + 0.5, end + 0.2, end], seed, norm)
    figures = draw(study())
    (axes,) = figures["curves_step"].axes
    assert [line.get_label() for line in axes.lines] == list(ends)
    for line, drawn, losses in zip(axes.lines, axes.collections, ends.values(), strict=True):
        assert np.asarray(line.get_ydata())[-1] == pytest.approx(np.mean(losses))
        last = [y for x, y in drawn.get_paths()[0].vertices if x == 4]
        assert (min(last), max(last)) == pytest.approx((min(losses), max(losses)))
    assert axes.get_title(loc="left") == "mean and range of 3 seeds\nfrom step 1 on"
    assert axes.get_ylim()[1] < 6  # not spent on the first step
    figures["curves_step"].draw_without_rendering()
    assert figures["curves_step"].legends[0].get_window_extent().ymax < axes.get_window_extent().ymin
    bars = {bar.get_label(): to_hex(bar[0].get_color()) for bar in figures["time"].axes[0].containers}
    assert bars == {name: color for name, (color, _) in lines(figures["curves_step"]).items()}


@pytest.fixture
def crowd(write: Write, study: Build) -> Study:
    """15 learning rates whose curves are all the same, but for the worst ones, the first of which is the baseline."""
    for number, rate in enumerate(np.geomspace(1e-4, 1e-2, 15)):
        settings = {"optimizer": {"learning_rate": float(rate)}}
        write(2.0 + 0.1 * (number in (0, 5, 6, 7)), 1, settings=settings, name=f"r{number:02d}")
    return study()


def test_a_crowd_of_equal_curves(crowd: Study) -> None:
    figures = draw(crowd)
    (axes,) = figures["curves_step"].axes
    assert len(axes.lines) == MOST_LINES == 12
    assert axes.lines[0].get_label() == crowd.baseline
    assert axes.get_title(loc="left") == f"from step 1 on\n{crowd.baseline} and the best 11 of 14 others"
    assert len(set(lines(figures["curves_step"]).values())) == 12  # no two look alike
    widths = [line.get_linewidth() for line in sorted(axes.lines, key=lambda line: line.get_zorder())]
    assert (np.diff(widths) < 0).all()  # so that each is seen below those above it
    assert figures["sensitivity_learning_rate"].axes[0].get_xscale() == "log"
    assert "heat_map" not in figures


def test_the_picture_of_a_sweep(write: Write, tmp_path: Path) -> None:
    write([4.0, 3.0], 1, status="running")
    assert not plot_runs(tmp_path / "sweep", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
    write(2.0, 2)
    assert plot_runs(tmp_path / "sweep", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_band_of_curves_on_different_steps(write: Write, study: Build) -> None:
    write([4.0, 3.0, 2.0], 1)
    write([4.0, 3.0, 2.0, 1.0], 2)
    x, mean, low, high = band(study().variants[0], "step")
    assert (x[0], x[-1]) == (0, 2)
    assert (low <= mean).all()
    assert (mean <= high).all()


def check_page(text: str) -> None:
    """A page that is whole, loads nothing, and says what figures and tables are to those who do not see them."""
    for tag in ("html", "section", "figure", "div", "table", "tr", "svg", "dl", "p"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    links = re.findall(r'(?:href|src)="([^"]*)"', text)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"https?://|@import|url\((?!#)|<script", text)
    assert all(re.search(r'aria-label="[^"]', tag) for tag in re.findall(r'<[^>]*role="img"[^>]*>', text))
    assert all('scope="' in tag for tag in re.findall(r"<th[ >][^>]*>?", text))
    identifiers = re.findall(r' id="([^"]*)"', text)
    assert len(identifiers) == len(set(identifiers))


def test_all_files_are_there(page: Path) -> None:
    text = page.read_text()
    names = {"forest", "curves_step", "curves_tokens", "curves_seconds", "heat_map", "time", "diagnostics"}
    assert {p.name for p in (page.parent / "figures").iterdir()} == {f"{n}.{e}" for n in names for e in ("png", "svg")}
    tables = {f"{n}.{e}" for n in ("variants", "comparisons", "runs", "speed") for e in ("csv", "md", "tex")}
    assert {p.name for p in (page.parent / "tables").iterdir()} == tables
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in page.parent.rglob("*.png"))
    check_page(text)
    assert len(text.encode()) < 2_000_000
    assert text.count("<svg") == len(names)
    for words in ("a &lt;title&gt;", "&lt;script&gt;alert(0)&lt;/script&gt; &amp; so", "1 diverged",
                  "The training loss of batchnorm pre h2", "python -m gptexp.compare x"):  # fmt: skip
        assert words in text


@pytest.mark.slow
def test_equal_results_give_equal_bytes(grid: Study, page: Path, tmp_path: Path) -> None:
    again = write_report(grid, tmp_path, "a <title>", "python -m gptexp.compare x")
    for path in filter(Path.is_file, page.parent.rglob("*")):
        assert path.read_bytes() == (again.parent / path.relative_to(page.parent)).read_bytes(), path


def test_csv_parses_back_to_the_same_numbers(grid: Study, page: Path) -> None:
    for name, table in all_tables(grid).items():
        path = page.parent / "tables" / f"{name}.csv"
        back = pd.read_csv(path, float_precision="round_trip", dtype={"n_head": str})
        assert list(back.columns) == list(table.columns)
        for column in table.select_dtypes("float"):
            np.testing.assert_array_equal(back[column].to_numpy(), table[column].to_numpy())
        assert any("seconds" in column for column in table) == (name == "speed")
    differences = all_tables(grid)["comparisons"]["difference"]
    assert differences.tolist() == [c.judgement.mean for c in grid.comparisons]
    assert len(differences) == 11 + 2 + 1 + 1  # variants, norms, placement, heads


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
    (row,) = speed_table(found, target=2.5).to_dict("records")
    assert (row["reached"], row["of"]) == (1, 2)
    assert (row["to_target_step"], row["to_target_tokens"], row["to_target_seconds"]) == (2, 2 * 768, 0.02)
    assert speed_table(found)["target"][0] == pytest.approx(2.3)
    assert math.isnan(speed_table(found, target=1.0)["to_target_step"][0])


def test_a_sweep_without_a_finished_run(write: Write, study: Build, tmp_path: Path) -> None:
    write([], 1, status="running")
    write([4.0], 2, "rmsnorm", status="failed")
    text = write_report(study(), tmp_path / "report", "t", "c").read_text()
    check_page(text)
    assert "No run has finished" in text
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
def test_the_page_in_a_browser(browser: str, page: Path, tmp_path: Path) -> None:
    script = """
        const shown = () => [...d.querySelectorAll('.curve')].filter(c => c.offsetParent).map(c => c.classList[1]);
        const scale = m => Math.hypot(m.a, m.b);
        const size = t => parseFloat(w.getComputedStyle(t).fontSize) * scale(t.getScreenCTM());
        const before = shown();
        d.querySelector('label[for=axis-seconds]').click();
        const drawn = [...d.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height > 100);
        return {
            width: d.documentElement.scrollWidth, inner: d.documentElement.clientWidth, before, after: shown(),
            drawn: drawn.length, h1: d.querySelector('h1').textContent,
            smallest: Math.min(...drawn.flatMap(s => [...s.querySelectorAll('text')].map(size))),
        };
    """
    found, console = load(browser, Path(shutil.copy(page, tmp_path)), script, tmp_path)
    assert found["width"] == found["inner"]  # nothing sticks out
    assert found["before"] == ["curves_step"]
    assert found["after"] == ["curves_seconds"]
    assert found["drawn"] == 5  # two curves are hidden
    assert float(str(found["smallest"])) > 9  # pixels of a phone
    assert str(found["h1"]).startswith("rmsnorm is worse than layernorm by 0.029 nats")
    assert console == ""
