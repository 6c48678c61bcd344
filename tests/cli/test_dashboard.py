"""The specification of the W&B workspace, and what the command says where it cannot make it."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptexp import dashboard
from gptexp.config.schema import known_keys
from gptexp.runs.files import METRICS

Command = Callable[..., int]


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("spec") / "view.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gptexp", f"spec={path}", "project=mine", "entity=team", "name=side by side"])
        dashboard.main()
    view: dict[str, Any] = json.loads(path.read_text())
    assert (view["project"], view["entity"], view["name"]) == ("mine", "team", "side by side")
    return view


def setting(name: str) -> dict[str, str]:
    return {"type": "Config", "name": name}


FACTORS = ["model.norm", "model.placement", "model.n_head"]
LOWEST = {"type": "SummaryMetric", "name": "val/loss.min"}


def test_the_sections(view: dict[str, Any]) -> None:
    found = {section["name"]: section["panels"] for section in view["sections"]}
    assert list(found) == ["loss", "variants", "speed", "training", "diagnostics", "samples"]
    assert all(section["is_open"] for section in view["sections"])
    titles = {name: [panel.get("title") for panel in panels] for name, panels in found.items()}
    assert titles["loss"][:4] == [
        "val/loss by step", "val/loss by tokens", "val/loss by seconds", "train/loss by step"]  # fmt: skip
    assert "val/bpc by step" in titles["loss"]
    assert [(p["groupby_aggfunc"], p["groupby_rangefunc"]) for p in found["loss"]] == [("mean", "minmax")] * 6
    assert titles["variants"][:3] == [f"lowest val/loss by {factor}" for factor in FACTORS]
    assert [panel["groupby"] for panel in found["variants"][:3]] == list(map(setting, FACTORS))
    assert (found["variants"][3]["x"], found["variants"][3]["y"]) == (setting("optimizer.learning_rate"), LOWEST)
    assert [column["metric"] for column in found["variants"][4]["columns"]][3:] == [
        setting("optimizer.learning_rate"), LOWEST]  # fmt: skip
    assert {"tokens_per_second by step", "mfu by step"} <= set(titles["speed"])
    assert titles["training"] == ["grad_norm by step", "learning_rate by step"]
    assert found["diagnostics"][0]["metric_regex"] == "diagnostics/grad_norm/.*"
    assert found["samples"][0]["table_name"] == "samples"


def parts(value: Any) -> Iterator[dict[str, Any]]:
    """A part of a specification, and all parts of it."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(part)


def test_every_metric_and_key_exists(view: dict[str, Any]) -> None:
    found = list(parts(view))
    named = {kind: {part["name"] for part in found if part.get("type") in kind}
             for kind in (("Config",), ("SummaryMetric", "Summary"))}  # fmt: skip
    axes = [part.get(key) for part in found for key in ("x", "y", "metrics")]
    metrics = {metric for axis in axes for metric in ([axis] if isinstance(axis, str) else axis or ())
               if isinstance(metric, str)} | named["SummaryMetric", "Summary"]  # fmt: skip
    metrics -= {"name", "type"}  # of axes that are parts themselves
    assert {m.removesuffix(".min") for m in metrics} <= {*METRICS, "trainer/global_step"}
    assert {"trainer/global_step", "tokens", "seconds", "val/loss", "val/loss.min"} <= metrics
    assert named["Config",] == {*FACTORS, "optimizer.learning_rate"} <= set(known_keys())


def test_runs_are_grouped_by_sweep_and_variant(view: dict[str, Any]) -> None:
    runs = view["runset_settings"]
    assert runs["groupby"] == [{"type": "Metric", "name": "Group"}, *map(setting, FACTORS)]
    assert "compare" in runs["filters"]
    assert runs["order"][0]["item"] == {"type": "Summary", "name": "val/loss.min"}
    assert runs["order"][0]["ascending"]


def test_mistakes_are_reported_together(command: Command, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command("porject=mine", "now", "name=a", "name=b", main=dashboard.main) == 2
    assert capfd.readouterr().err.splitlines() == [
        "error: now: cannot be read as a setting; a setting is written key=value",
        "error: name=b: name is set twice",
        "error: porject=mine: unknown key; did you mean project?",
        "error: W&B has no API key; run wandb login, or write the specification to a file with spec=FILE",
    ]
    assert command(f"spec={tmp_path / 'no' / 'x.json'}", main=dashboard.main) == 2
    assert "cannot be written (No such file or directory)" in capfd.readouterr().err
    assert command(f"spec={tmp_path / 'x.json'}", "name=\U0001f600", main=dashboard.main) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: name=\U0001f600: ")


def test_the_package_is_named_where_it_is_missing(
    command: Command, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "find_spec", lambda _: None)
    assert command("spec=x.json", main=dashboard.main) == 2
    told = "error: wandb-workspaces is not installed; pip install 'gptexp[dashboard]'\n"
    assert capfd.readouterr().err == told
