"""The examples of docs/extend.md: a component of each of the ten kinds, in files outside the package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptexp import registry
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "extend.md").read_text()
FILES = dict(re.findall(r'^```python title="(\w+)\.py"\n(.+?)^```', PAGE, flags=re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^\$ GPTEXP_IMPORT=\w+ python -m (.+)", PAGE, flags=re.MULTILINE)
NAMES = dict(re.findall(r'^@([A-Z]+)\.register\("(\w+)"', "\n".join(FILES.values()), flags=re.MULTILINE))
GROUPS = {getattr(registry, kind).name.replace("corpus", "data"): name for kind, name in NAMES.items()}
SHORT = ("max_steps=20 eval_interval=10 eval_windows=4 sample_tokens=5 batch_size=4 model.block_size=16 "
         "schedule.warmup_steps=2 hardware=cpu logger=none")  # fmt: skip
RUNNER = """
import contextlib, io, json, shlex, sys
from importlib import import_module

results = []
for line in sys.stdin:
    module, *sys.argv[1:] = shlex.split(line)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = import_module(module).main() or 0
        except SystemExit as stop:
            code = stop.code or 0
    results.append((code, out.getvalue(), err.getvalue()))
from pathlib import Path
from gptexp.runs.run import Run
tags = {run.name: Run.open(run).config.model.tags for run in sorted(Path("outputs/runs").glob("*"))}
print(json.dumps([results, tags]))
"""  # in one process, as starting each takes longer than its work


def run(lines: list[str], folder: Path) -> tuple[list[tuple[int, str, str]], dict[str, list[str]]]:
    """Exit status, output and errors of each command, where the examples are; and the tags of each run."""
    for name, code in FILES.items():
        (folder / f"{name}.py").write_text(code)
    environment: dict[str, Any] = os.environ | {"GPTEXP_IMPORT": ",".join(FILES)}
    done = subprocess.run([sys.executable, "-c", RUNNER], input="\n".join(lines), cwd=folder, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    results, tags = json.loads(done.stdout.splitlines()[-1])
    return results, tags


def test_each_kind_has_an_example_a_command_and_a_name_that_is_new() -> None:
    assert {getattr(registry, kind) for kind in NAMES} == set(registry.KINDS)
    for kind, name in NAMES.items():
        assert name not in getattr(registry, kind)
    for group, name in GROUPS.items():
        assert any(f" {group}={name}" in line for line in COMMANDS)


def test_help_and_misspellings_know_the_examples(tmp_path: Path) -> None:
    misspelt = " ".join(f"{group}={name}{name[-1]}" for group, name in GROUPS.items())
    commands = ["gptexp.train --help", f"gptexp.train {misspelt}", "gptexp.train task=letters data=sums logger=none"]
    (_, text, _), (code, _, err), nothing = run(commands, tmp_path)[0]
    assert nothing == [2, "", "error: task=letters: has nothing to predict in the training split of data=sums\n"]
    for group, name in GROUPS.items():
        assert re.search(rf"^  {group}={name} +\w", text, flags=re.MULTILINE)  # with what it is
        assert f"error: {group}={name}{name[-1]}: unknown; did you mean {name}?" in err
    assert code == 2
    assert re.search(r"model\.norms\.power\.power=0\.5\s+0 leaves x as it is", text)
    assert re.search(r"model\.placements\.tail\.blocks=1\s+How many blocks", text)


@pytest.mark.slow
def test_the_examples_train_are_compared_and_audited(tmp_path: Path) -> None:
    """All commands of the page, in one process, and a run and a comparison of several examples together."""
    together = " ".join(f"{group}={name}" for group, name in GROUPS.items() if group not in ("model", "data"))
    lines = [*COMMANDS, f"gptexp.train {together} seed=7"]
    for i, line in enumerate(lines):
        if line.startswith("gptexp.train"):
            small = "" if "model=" in line else " model.n_layer=2 model.n_embd=32"
            lines[i] += f"{'' if 'data=' in line else ' data=pydocs'} {SHORT}{small}"
    results, tags = run(lines, tmp_path)
    assert [(line, err) for line, (code, _, err) in zip(lines, results, strict=True) if code] == []
    for name in tags:
        path = tmp_path / "outputs" / "runs" / name
        assert json.loads((path / "run.json").read_text())["status"] == "done", name
        assert (path / "metrics.csv").read_text().splitlines()[-1].startswith("20,")
    variants = {name.split("_", 2)[2]: name for name in tags}
    assert len(tags) == len(GROUPS) + 1
    assert {"power-pre-h4-s1337", "layernorm-tail-h4-s1337", "average-s1337", "power-tail-h4-s7"} <= set(variants)
    assert tags[variants["power-tail-h4-s7"]] == ["power", "tail", "h4"]
    audits = {line: out for line, (_, out, _) in zip(lines, results, strict=True) if "audit" in line}
    assert sorted(line.split()[1].partition("=")[0] for line in audits) == ["norm", "placement", "position"]
    assert all("no (causal)" in out and "YES" not in out for out in audits.values())
    compared = " ".join(f"outputs/runs/{variants[name]}" for name in ("power-pre-h4-s1337", "layernorm-tail-h4-s1337"))
    ((code, out, _),), _ = run([f"gptexp.compare {compared}"], tmp_path)
    assert code == 0
    assert re.search(r"│ layernorm .* undecided", out)  # one seed decides nothing
