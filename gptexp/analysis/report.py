"""A study as files: a page that needs nothing beside it, figures as PNG and SVG, tables as CSV, Markdown, LaTeX."""

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gptexp.analysis import conclusion
from gptexp.analysis.figures import INK, colours, draw, rendered
from gptexp.analysis.study import Study
from gptexp.analysis.tables import ENDS, all_tables, latex, markdown, ranking_table, readable
from gptexp.records import read_samples
from gptexp.runs import Run, write_atomically

MOST_LOST = 60  # runs without a result that the page names; the table has all


def write_report(study: Study, folder: Path, title: str, command: str, target: float | None = None) -> Path:
    """Write all files of a study into a folder; it is made, and files of the same names are replaced.

    The page says which command repeats the comparison. For the target see `gptexp.analysis.tables.speed_table`.

    Returns:
        the path of report.html.
    """
    tables, figures = all_tables(study, target), draw(study)
    for name in ("tables", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        text = readable(table)
        write_atomically(folder / "tables" / f"{name}.csv", table.to_csv(index=False, lineterminator="\n").encode())
        write_atomically(folder / "tables" / f"{name}.md", markdown(text).encode())
        write_atomically(folder / "tables" / f"{name}.tex", latex(text).encode())
    images = {}
    for name, figure in figures.items():
        write_atomically(folder / "figures" / f"{name}.png", rendered(figure, "png", name))
        images[name] = rendered(figure, "svg", name)
        write_atomically(folder / "figures" / f"{name}.svg", images[name])
    page = folder / "report.html"
    write_atomically(page, html(study, tables, images, title, command).encode())
    return page


def html(study: Study, tables: dict[str, pd.DataFrame], images: dict[str, bytes], title: str, command: str) -> str:
    """The page. It loads nothing: styles and figures are part of it."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    seed, texts = last_samples(study)
    return environment.get_template("report.html.j2").render(
        title=title, study=study, conclusion=conclusion, command=command, seed=seed, samples=texts, ends=ENDS,
        ranking=_rows(ranking_table(study)), effects=_rows(tables["comparisons"].query("kind == 'factor'")),
        speed=_rows(tables["speed"]), figures={name: inline(image) for name, image in images.items()},
        audit=_audit(study), lost=_lost(study), origin=_origin(study), colour=colours(study),
    )  # fmt: skip


def inline(image: bytes) -> str:
    """A figure in SVG as an element of a page: ink of the surrounding text's colour, no size of its own."""
    text = image.decode()
    used = set(re.findall(r"#([\w.-]+)", text))  # other ids are the same in every figure
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    head, _, body = text[text.index("<svg") :].replace(INK, "currentColor").partition(">")
    head = re.sub(r' (width|height|xmlns:xlink|xmlns|version)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    return f'{head} aria-hidden="true">{body}'


def _rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """The rows of a table as the page shows them, with a true minus sign."""
    text = readable(table).rename(columns=lambda c: c.replace(" ", "_")).replace("^-", "−", regex=True)
    rows: list[dict[str, str]] = text.to_dict("records")
    return rows


def last_samples(study: Study, most: int = 12, characters: int = 600) -> tuple[int | None, dict[str, str]]:
    """The last text of each variant's run with the seed that most of them have; the seed, and the texts by variant."""
    ranked = study.ranked()[:most]
    seeds = [seed for v in ranked for seed in v.runs]
    seed = max(sorted(set(seeds)), key=seeds.count, default=None)
    texts = {}
    for variant, record in ((v, r) for v in ranked for s, r in v.runs.items() if s == seed):
        with suppress(OSError, ValueError):
            for _, body in read_samples(Run(record.path).samples_path)[-1:]:
                text = body.strip("\n")
                texts[variant.label] = text[:characters] + ("…" if len(text) > characters else "")
    return seed, texts


def _audit(study: Study) -> list[dict[str, Any]]:
    """What each variant's training loss sees that it should not; nothing where no run has been asked."""
    rows = []
    for variant in study.variants:
        seen = [r.info["train_loss"] for r in variant.runs.values() if isinstance(r.info.get("train_loss"), dict)]
        if seen:
            later, others = (any(s.get(k) for s in seen) for k in ("sees_later_tokens", "sees_other_sequences"))
            rows.append({"variant": variant.label, "later": later, "others": others})
    return rows


def _lost(study: Study) -> list[tuple[str, str, str]]:
    """Runs that are not compared: name, what became of them, why."""
    lost = [(r.name, r.status, str(r.info.get("error") or "")) for r in study.records if not r.complete]
    lost += [(r.name, "put apart", reason) for reason, runs in study.apart.items() for r in runs]
    lost += [(u.path.name, "unreadable", u.reason) for u in study.unreadable]
    more = [("…", f"{len(lost) - MOST_LOST} more", "see tables/runs.csv")] if len(lost) > MOST_LOST else []
    return lost[:MOST_LOST] + more


def _origin(study: Study) -> list[tuple[str, list[str]]]:
    """Fingerprints, versions and devices of the runs, each distinct one once with the number of runs."""
    infos = [r.info for r in study.records]
    return [
        ("data", _distinct([f"{i.get('data', {}).get('corpus')} {i['fingerprints']['data'][:16]}" for i in infos])),
        ("code", _distinct([i["fingerprints"]["code"][:16] for i in infos])),
        ("versions", _distinct([_words(i.get("versions")) for i in infos])),
        ("device", _distinct([_words(i.get("device")) for i in infos])),
        ("settings", [f"{len({i['fingerprints']['config'] for i in infos})} configurations, seeds included; their "
                      "fingerprints are in tables/runs.csv"]),
    ]  # fmt: skip


def _words(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "unknown"


def _distinct(values: Sequence[str]) -> list[str]:
    found = Counter(values)
    return [value if len(found) == 1 else f"{value} ({conclusion.plural(n, 'run')})" for value, n in found.items()]
