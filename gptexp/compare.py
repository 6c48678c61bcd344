"""Which variant is better, by how much, and how sure is that? `python -m gptexp.compare DIR... [key=value ...]`

Takes sweeps and runs, finds out which settings vary, pairs the runs by seed, and judges every variant against the
baseline. Prints a table and writes a report, figures and tables. Works on an unfinished sweep, too.

    python -m gptexp.compare outputs/sweeps/norms
    python -m gptexp.compare outputs/sweeps/norms baseline="rmsnorm pre" delta=0.02

settings (key=value):
  baseline=LABEL   the variant that the others are compared with, or a word that it alone has; the first by default
  metric=final     final or best validation loss, with verdicts on the other one beside it; or exact_match, the
                   share of answers to problems that are right
  delta=0.01       the largest difference that counts as none, in nats per token; in bits per character where
                   vocabularies differ, as a share for exact_match
  alpha=0.05       the probability of claiming any difference where there is none
  target=LOSS      measure the steps, tokens and seconds to this loss; the baseline's mean by default
  output=DIR       where the files go; report/ in the first directory by default
  logger=none      wandb logs the report, its figures and tables to a W&B run of its own, beside the sweep's runs
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Lt

from gptexp.errors import UserError
from gptexp.processes.console import run_command

if TYPE_CHECKING:
    from gptexp.analysis.study import Study

log = logging.getLogger("gptexp")

VERDICT_STYLES = {"better": "green", "worse": "red", "equal": "blue", "baseline": "bold"}


@dataclass(frozen=True)
class CompareConfig:
    """Settings of the command; see the module's text."""

    baseline: str | None = None
    metric: Literal["final", "best", "exact_match"] = "final"
    delta: Annotated[float, Gt(0)] = 0.01
    alpha: Annotated[float, Gt(0), Lt(1)] = 0.05
    target: float | None = None
    output: str | None = None
    logger: Literal["none", "wandb"] = "none"


def main() -> None:
    """The command line."""
    run_command(__doc__, compare)


def compare(arguments: Sequence[str]) -> None:
    """Compare the runs that a command line names; print the table and write the files.

    Raises:
        UserError: with a line for every mistake.
    """
    config, folders = parse(arguments)
    from gptexp.analysis.collect import collect
    from gptexp.analysis.report import write_report
    from gptexp.analysis.study import build_study

    found = collect(folders)
    if not found.records:
        begun = [f"{bad.path}: {bad.reason}" for bad in found.unreadable]
        raise UserError(begun or f"{', '.join(map(str, folders))}: none of the {len(found.missing)} jobs has begun")
    study = build_study(found, baseline=config.baseline, metric=config.metric, delta=config.delta, alpha=config.alpha)
    folder = Path(config.output) if config.output else folders[0] / "report"
    title = ", ".join(dict.fromkeys(f.resolve().name for f in folders[:5])) + (", …" if len(folders) > 5 else "")
    command = f"python -m gptexp.compare {shlex.join(arguments)}"
    show(study)
    try:
        page = write_report(study, folder, title, command, config.target)
    except OSError as error:
        raise UserError(f"output={folder}: cannot be written ({error.strerror})") from error
    log.info("report: %s", page)
    if config.logger == "wandb":
        from gptexp.loggers.comparison import log_comparison

        log_comparison(study, page, title, command)


def parse(arguments: Sequence[str]) -> tuple[CompareConfig, list[Path]]:
    """The settings and the directories of a command line.

    Raises:
        UserError: with a line for every mistake.
    """
    from gptexp.config.settings import named_directories, read, read_arguments

    named, others = named_directories(arguments)
    problems = [f"{name}: there is no such directory" for name in named if not Path(name).is_dir()]
    values = read_arguments(others, problems)
    config: CompareConfig | None = read(CompareConfig, "", values, problems)
    if not named:
        problems.append("no directory is given; name sweeps or runs, such as outputs/sweeps/norms")
    if problems or config is None:
        raise UserError(problems)
    return config, [Path(name) for name in named]


def show(study: "Study") -> None:
    """Print the ranked table, the verdict and what else a reader must know."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from gptexp.analysis.summary import VERDICTS, advice, counts, disagreements, headline, percent, plural
    from gptexp.analysis.tables import ENDS, comparisons_table, ranking_table, readable

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    title = f"{study.measure.title}, {study.measure.of}; differences are from {study.baseline}"
    interval = f"{percent(1 - study.alpha)} interval"
    wanted = ("seeds", study.measure.column, "sd", "difference", interval, "p", "verdict", "seeds needed")
    effects = comparisons_table(study).query("kind != 'variant'")
    effects = effects.assign(variant=effects["factor"] + ": " + effects["this"] + " against " + effects["that"])
    tables = {"variant": ranking_table(study), "on average over the others, and together": effects}
    for name, rows in ((name, readable(table)) for name, table in tables.items() if study.baseline and len(table)):
        rows[interval] = (rows["low"] + " to " + rows["high"]).replace("– to –", "–")
        columns = [column for column in wanted if column in rows]
        table = Table(name, *(Column(c, justify="right") for c in columns), title=title if name == "variant" else None)
        for row in rows.to_dict("records"):
            lost = ", ".join(f"{row[end]} {end}" for end in ENDS if row.get(end, "0") != "0")
            label = Text(row["variant"], style="bold" if row["variant"] == study.baseline else "")
            label.append(f" ({lost})" if lost else "", style="yellow")
            row["verdict"] = Text(VERDICTS.get(row["verdict"], row["verdict"]), VERDICT_STYLES.get(row["verdict"], ""))
            table.add_row(label, *(row[column] for column in columns))
        console.print(table)
    console.print(" ".join(headline(study)), style="bold", soft_wrap=True)
    notes = [line] if (line := advice(study)) else []
    notes += [f"disagreement: {line}" for line in disagreements(study)[:5]]
    notes.append(f"{counts(study)}.")
    notes += [f"set apart: {plural(len(runs), 'run')} ({reason})" for reason, runs in study.apart.items()]
    notes += [f"unreadable: {path} ({reason})" for path, reason in study.unreadable]
    console.print(*notes, *(f"note: {note}" for note in (*study.notes, *study.assumptions)), sep="\n", soft_wrap=True)


if __name__ == "__main__":
    main()
