"""The groups that a command chooses from. Nothing here imports Hydra."""

import re
from importlib.resources import files
from pathlib import Path

from gptexp.registry import (
    ACTIVATIONS,
    CORPORA,
    MODELS,
    NORMS,
    OPTIMIZERS,
    PLACEMENTS,
    POSITIONS,
    SCHEDULES,
    TASKS,
    TOKENIZERS,
    Kind,
)

SECTIONS = {"model": MODELS, "task": TASKS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
"""Groups whose choices are a section each, with settings of its own."""

VALUES = {"norm": ("model", NORMS), "placement": ("model", PLACEMENTS), "position": ("model", POSITIONS),
          "activation": ("model", ACTIVATIONS), "tokenizer": ("data", TOKENIZERS)}  # fmt: skip
"""Groups whose choices are the value of one setting, by its section: norm=rmsnorm is model.norm=rmsnorm."""

CHOSEN = {*(f"{section}.{group}" for group, (section, _) in VALUES.items()),
          *(f"{section}.name" for section in (*SECTIONS, "data"))}  # fmt: skip
"""The settings whose value is the name of a registered component."""

_COUNTS = (1, 2, 4, 6, 8, 12, 16)
HEADS: dict[str, tuple[int, int | None]] = {
    **{f"h{n}": (n, None) for n in _COUNTS},
    **{f"h{n}_kv{k}": (n, k) for n in _COUNTS for k in _COUNTS if k < n and n % k == 0},
}
"""The choices of the group `heads`: attention heads, and those of keys and values if they are fewer. Hydra takes no
number for a choice; model.n_head and model.n_kv_head take any."""


def conf_dir() -> str:
    """The folder of the configuration files: beside the package in a checkout, inside it once installed."""
    package = Path(str(files("gptexp")))
    inside, beside = package / "conf", package.parent / "conf"
    return str(inside if inside.is_dir() else beside)


def groups() -> dict[str, dict[str, str]]:
    """What there is to choose from: for each group, the meaning of each of its choices."""
    kinds: dict[str, Kind] = {**{group: kind for group, (_, kind) in VALUES.items()}, **SECTIONS, "data": CORPORA}
    found = {group: {name: component.summary for name, component in kind.items()} for group, kind in kinds.items()}
    found["heads"] = {name: f"{n} attention head{'s' * (n > 1)}{f', {k} of keys and values' if k else ''}."
                      for name, (n, k) in HEADS.items()}  # fmt: skip
    for folder in sorted(path for path in Path(conf_dir()).iterdir() if path.is_dir()):
        files = sorted(folder.rglob("*.yaml"))
        found[folder.name] = {str(f.relative_to(folder).with_suffix("")): _comment(f) for f in files}
    return found


def _comment(file: Path) -> str:
    """The first sentence of the comment at the top of a file."""
    lines = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
    text = " ".join(line for line in lines if not line.startswith("@"))
    return re.split(r"(?<!\bal)\. ", text)[0].rstrip(".") + "."
