"""The specification of the W&B workspace, and what the command says where it cannot make it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptexp import dashboard
from gptexp.config import known_keys
from gptexp.records import METRICS

Command = Callable[..., int]


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("spec") / "view.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gptexp", f"spec={path}", "project=mine", "entity=team", "name=side by side"])
        dashboard.main()
    view = json.loads(path.read_text())
    assert (view["project"], view["entity"], view["displayName"]) == ("mine", "team", "side by side")
    return view["spec"]["section"]


def test_the_sections(section: dict[str, Any]) -> None:
    found = {s["name"]: [p["config"] for p in s["panels"]] for s in section["panelBankConfig"]["sections"]}
    assert list(found) == ["loss", "variants", "speed", "training", "diagnostics", "samples"]
    titles = {name: [c.get("chartTitle") for c in panels] for name, panels in found.items()}
    assert titles["loss"][:4] == [
        "val/loss by step", "val/loss by tokens", "val/loss by seconds", "train/loss by step"]  # fmt: skip
    assert "val/bpc by step" in titles["loss"]
    assert titles["variants"][:3] == [f"lowest val/loss by model.{x}" for x in ("norm", "placement", "n_head")]
    assert [c["groupBy"] for c in found["variants"][:3]] == ["model.value.norm", "model.value.placement",
                                                             "model.value.n_head"]  # fmt: skip
    assert found["variants"][3]["xAxis"] == "config:optimizer.value.learning_rate"
    assert [c["accessor"] for c in found["variants"][4]["columns"]][3:] == [
        "config:optimizer.value.learning_rate", "summary:val/loss.min"]  # fmt: skip
    assert {"tokens_per_second by step", "mfu by step"} <= set(titles["speed"])
    assert titles["training"] == ["grad_norm by step", "learning_rate by step"]
    assert found["diagnostics"][0]["metricRegex"] == "diagnostics/grad_norm/.*"
    assert '"val": "samples"' in json.dumps(found["samples"])


def test_every_metric_and_key_exists(section: dict[str, Any]) -> None:
    panels = [p["config"] for s in section["panelBankConfig"]["sections"] for p in s["panels"]]
    named = {name for c in panels for name in (*c.get("metrics", []), c.get("xAxis", "step"))}
    assert {m.removesuffix(".min") for m in named if not m.startswith("config:")} <= set(METRICS)
    keys = {c["groupBy"] for c in panels if "groupBy" in c}
    keys |= {c["xAxis"].removeprefix("config:") for c in panels if c.get("xAxis", "").startswith("config:")}
    keys |= {column["accessor"].removeprefix("config:") for c in panels for column in c.get("columns", [])
             if column["accessor"].startswith("config:")}  # fmt: skip
    assert len(keys) == 4
    assert {key.replace(".value", "") for key in keys} <= set(known_keys())


def test_runs_are_grouped_by_sweep_and_variant(section: dict[str, Any]) -> None:
    (runs,) = section["runSets"]
    assert [(g["section"], g["name"]) for g in runs["grouping"]] == [
        ("run", "group"), ("config", "model.value.norm"), ("config", "model.value.placement"),
        ("config", "model.value.n_head"),
    ]  # fmt: skip
    assert "compare" in json.dumps(runs["filters"])
    assert runs["sort"]["keys"][0]["key"] == {"section": "summary", "name": "val/loss.min"}


def test_mistakes_are_told_together(command: Command, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
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
