"""What can be chosen and set, with its default and meaning: the text of `--help`, and the page docs/settings.md."""

import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from gptexp.config.choices import groups
from gptexp.config.schema import Config
from gptexp.config.settings import dataclasses_of, describe, documentation, hints_of, show
from gptexp.registry import NORMS, PLACEMENTS

HEADER = """\
python -m gptexp.train [group=choice | key=value ...]

Trains a small GPT and leaves a run directory: metrics, checkpoints, samples, a picture.

    python -m gptexp.train norm=rmsnorm heads=h8
    python -m gptexp.train -m norm=layernorm,rmsnorm seed=1,2,3
    python -m gptexp.train resume=outputs/runs/NAME

--cfg job shows the settings that a command stands for; --hydra-help, Hydra's own options."""


class Setting(NamedTuple):
    """A setting."""

    key: str  # dotted
    default: str  # as a user would type it
    allowed: str  # in words
    meaning: str  # in a sentence or two


def sections() -> dict[str, list[Setting]]:
    """Every setting, by the heading that it stands under; settings of no section under ""."""
    found: dict[str, list[Setting]] = {"": list(_settings(Config, ""))}
    for name, hint in hints_of(Config).items():
        classes = dataclasses_of(hint)
        for cls in classes:
            chosen = f"{name}={cls.name}" if len(classes) > 1 else name
            found[chosen] = [s for s in _settings(cls, f"{name}.") if len(classes) == 1 or s.key != f"{name}.name"]
    for group, kind in {"norm": NORMS, "placement": PLACEMENTS}.items():
        for name, component in kind.items():
            found[f"{group}={name}"] = list(_settings(component.settings, f"model.{group}s.{name}."))
    return {heading: settings for heading, settings in found.items() if settings}


def _settings(cls: Any, prefix: str) -> Iterator[Setting]:
    made, meanings, hints = cls(), documentation(cls), hints_of(cls)
    for f in fields(cls):
        if f"{prefix}{f.name}" == "model.vocab_size" or dataclasses_of(hints[f.name]):
            continue
        default = getattr(made, f.name)
        table = isinstance(default, dict)
        allowed = "a table" if table else describe(hints[f.name])
        yield Setting(f"{prefix}{f.name}", "{}" if table else show(default), allowed, meanings[f.name])


def help_text(width: int = 110) -> str:
    """What `--help` prints."""
    lines = [HEADER, "", "Choose with group=choice:"]
    for group, choices in groups().items():
        lines += ["", *(_entry(f"{group}={name}", meaning, width, 36) for name, meaning in choices.items())]
    lines += ["", "Set with key=value (defaults are shown):"]
    for heading, settings in sections().items():
        lines += ["", f"  with {heading}:"] if "=" in heading else [""]
        lines += [_entry(f"{s.key}={s.default}", s.meaning, width, 36) for s in settings]
    return "\n".join(lines)


def _entry(name: str, text: str, width: int, column: int) -> str:
    first = f"  {name}".ljust(column)
    lines = textwrap.wrap(text, width - column) or [""]
    if len(first) >= column and not first.endswith(" "):
        first = f"{first}\n{' ' * column}"
    return (first + f"\n{' ' * column}".join(lines)).rstrip()


def settings_page() -> str:
    """docs/settings.md."""
    parts = ["# Settings", "", "`python -m gptexp.config.reference` makes this page; `python -m gptexp.train --help` "
             "prints the same.", "", "## Choices", "", "Write `group=choice`."]  # fmt: skip
    for group, choices in groups().items():
        parts += ["", f"### {group}", "", "| choice | meaning |", "|---|---|"]
        parts += [f"| `{name}` | {_cell(meaning)} |" for name, meaning in choices.items()]
    parts += ["", "## Values", "", "Write `key=value`."]
    for heading, settings in sections().items():
        parts += ["", f"### {f'With {heading}' if '=' in heading else heading or 'Of a run'}", "",
                  "| setting | default | allowed | meaning |", "|---|---|---|---|"]  # fmt: skip
        parts += [f"| `{s.key}` | `{s.default}` | {_cell(s.allowed)} | {_cell(s.meaning)} |" for s in settings]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    Path("docs/settings.md").write_text(settings_page(), encoding="utf-8")
