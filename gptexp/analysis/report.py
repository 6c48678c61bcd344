"""A study as files: a page that needs nothing beside it, figures as PNG and SVG, tables as CSV, Markdown, LaTeX."""

import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gptexp.analysis import summary
from gptexp.analysis.figures import INK, draw, looks, rendered
from gptexp.analysis.study import Study
from gptexp.analysis.tables import ENDS, all_tables, latex, markdown, ranking_table, readable
from gptexp.runs.files import read_samples
from gptexp.runs.run import Run, write_atomically

MOST_LOST = 60  # runs without a result that the page names; the table has all


def write_report(study: Study, folder: Path, title: str, command: str, target: float | None = None) -> Path:
    """Write all files of a study into a folder; it is made, and files of the same names are replaced.

    The page says which command repeats the comparison. For the target see `gptexp.analysis.tables.speed_table`.

    Returns:
        the path of report.html.
    """
    files: dict[str, bytes] = {}
    tables, images = all_tables(study, target), {}
    for name, table in tables.items():
        text = readable(table)
        forms = {"csv": table.to_csv(index=False, lineterminator="\n"), "md": markdown(text), "tex": latex(text)}
        files |= {f"tables/{name}.{form}": content.encode() for form, content in forms.items()}
    for name, figure in draw(study).items():
        images[name] = rendered(figure, "svg", name)
        files |= {f"figures/{name}.png": rendered(figure, "png", name), f"figures/{name}.svg": images[name]}
    files["report.html"] = html(study, tables, images, title, command).encode()
    for part in ("tables", "figures"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return folder / "report.html"


def html(study: Study, tables: dict[str, pd.DataFrame], images: dict[str, bytes], title: str, command: str) -> str:
    """The page. It loads nothing: styles and figures are part of it."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    return environment.get_template("report.html.j2").render(
        title=title, study=study, summary=summary, command=command, samples=_samples(study), ends=ENDS,
        ranking=_rows(ranking_table(study)), effects=_rows(tables["comparisons"].query("kind != 'variant'")),
        speed=_rows(tables["speed"]), figures={name: inline(image) for name, image in images.items()},
        audit=_audit(study), lost=_lost(study), origin=_origin(study), looks=looks(study),
    )  # fmt: skip


def inline(image: bytes) -> str:
    """A figure in SVG as an element of a page, its ink the color of the surrounding text.

    It fills the page, but its text stays between 10 and 18 pixels: outside that, it scrolls or stops short.
    """
    text = image.decode()
    used = set(re.findall(r"#([\w.-]+)", text))  # other ids are the same in every figure
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    head, _, body = text[text.index("<svg") :].replace(INK, "currentColor").partition(">")
    points = float(re.findall(r'width="([\d.]+)pt"', head)[0])
    head = re.sub(r' (width|height|xmlns:xlink|xmlns|version)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    return f'{head} aria-hidden="true" style="min-width: {0.96 * points:g}px; max-width: {1.7 * points:g}px">{body}'


def _rows(table: pd.DataFrame) -> Any:
    """The rows of a table as the page shows them, with a true minus sign."""
    text = readable(table).rename(columns=lambda c: c.replace(" ", "_")).replace(" x ", " × ", regex=True)
    return text.replace("^-", "−", regex=True).to_dict("records")


def _samples(study: Study, most: int = 12, characters: int = 600) -> dict[str, str]:
    """The last text that the first run of each variant sampled, by the variant's label and the seed."""
    texts = {}
    for variant in study.ranked()[:most]:
        seed, record = next(iter(variant.runs.items()))
        with suppress(OSError, ValueError):
            for _, body in read_samples(Run(record.path).samples_path)[-1:]:
                text = body.strip("\n")
                texts[f"{variant.label} · seed {seed}"] = text[:characters] + "…" * (len(text) > characters)
    return texts


def _audit(study: Study) -> list[tuple[Any, ...]]:
    """For each variant that was audited: whether its training loss sees later tokens, and other sequences."""
    found = {v.label: [r.info["train_loss"] for r in v.runs.values() if isinstance(r.info.get("train_loss"), dict)]
             for v in study.variants}  # fmt: skip
    return [(label, *(any(s.get(k) for s in seen) for k in ("sees_later_tokens", "sees_other_sequences")))
            for label, seen in found.items() if seen]  # fmt: skip


def _lost(study: Study) -> list[tuple[str, str, str]]:
    """Runs that are not compared: name, what became of them, why."""
    lost = [(r.name, r.status, str(r.info.get("error") or "")) for r in study.records if not r.complete]
    lost += [(r.name, "set apart", reason) for reason, runs in study.apart.items() for r in runs]
    lost += [(u.path.name, "unreadable", u.reason) for u in study.unreadable]
    more = [("…", f"{len(lost) - MOST_LOST} more", "see tables/runs.csv")] if len(lost) > MOST_LOST else []
    return lost[:MOST_LOST] + more


def _origin(study: Study) -> dict[str, list[str]]:
    """Fingerprints, versions and devices of the runs, each distinct one once with the number of runs."""
    infos = [r.info for r in study.records]
    facts = {
        "data": Counter(f"{i.get('data', {}).get('corpus')} {i['fingerprints']['data'][:16]}" for i in infos),
        "code": Counter(i["fingerprints"]["code"][:16] for i in infos),
        **{key: Counter(", ".join(f"{k} {v}" for k, v in (i.get(key) or {"": "unknown"}).items()) for i in infos)
           for key in ("versions", "device")},
    }  # fmt: skip
    return {what: [value if len(found) == 1 else f"{value} ({summary.plural(n, 'run')})" for value, n in found.items()]
            for what, found in facts.items()}  # fmt: skip
