"""The definition of a W&B sweep, and a run under its agent, which gives the settings and the run's id."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb.sdk.lib.config_util import save_config_file_from_dict

from gptexp.config.command_line import check
from gptexp.config.composition import register_choices
from gptexp.config.schema import known_keys
from gptexp.runs.files import METRICS
from gptexp.runs.run import Run
from tests.cli.wandb_file import read_run
from tests.conftest import REPOSITORY, TINY, finish, spawn

SWEEP: dict[str, Any] = yaml.safe_load((REPOSITORY / "docs" / "wandb_sweep.yaml").read_text())


def trials() -> list[dict[str, Any]]:
    """Every combination of values, and of the two ends of each range."""
    choices = {
        name: entry.get("values") or [entry["value"]] if "min" not in entry else [entry["min"], entry["max"]]
        for name, entry in SWEEP["parameters"].items()
    }
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def command_line(trial: dict[str, Any]) -> list[str]:
    """The command of a trial, as wandb's agent builds it."""
    arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in trial.items()}})
    arguments |= {"env": ["/usr/bin/env"], "interpreter": ["python"]}
    parts = ([part] if not part.startswith("${") else arguments[part[2:-1]] for part in map(str, SWEEP["command"]))
    return list(itertools.chain(*parts))


def test_the_definition() -> None:
    assert SWEEP["method"] in ("grid", "random", "bayes")
    assert SWEEP["metric"] == {"name": "val/loss", "goal": "minimize"}
    assert SWEEP["metric"]["name"] in METRICS
    assert set(SWEEP["parameters"]) <= set(known_keys())
    assert create_sweep_command(SWEEP["command"]) == SWEEP["command"]
    assert (REPOSITORY / SWEEP["program"]).exists()
    assert set(SWEEP) == {"name", "project", "program", "method", "metric", "parameters", "command"}


@pytest.mark.parametrize("trial", trials(), ids=lambda trial: "-".join(map(str, trial.values())))
def test_every_trial_is_a_valid_command(trial: dict[str, Any]) -> None:
    line = command_line(trial)
    assert line[:4] == ["/usr/bin/env", "python", "-m", "gptexp.train"]
    assert len(line) == 4 + len(trial)
    register_choices()
    assert check(line[4:], multirun=False) == []


@pytest.mark.slow
def test_a_run_under_the_agent(corpus: Path, tmp_path: Path) -> None:
    trial = {"model.norm": "rmsnorm", "optimizer.learning_rate": 0.003}
    save_config_file_from_dict(str(tmp_path / "trial.yaml"), {name: {"value": value} for name, value in trial.items()})
    given = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "run1", "WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team",
             "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "trial.yaml")}  # fmt: skip
    arguments = command_line(trial)[4:]
    folder = tmp_path / "run"
    settings = [*TINY, "logger=wandb", f"data.path={corpus}", f"hydra.run.dir={folder}", "max_steps=8", *arguments]
    code, _, err = finish(spawn(*settings, cwd=tmp_path, env=os.environ | given | {"PYTHONPATH": str(REPOSITORY)}))
    assert code == 0, err
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    record = read_run(file)
    assert (record.id, record.sweep, record.group) == ("run1", "sweep1", "sweep1")
    assert (record.project, record.entity) == ("theirs", "team")
    assert Run.open(folder).info["loggers"]["wandb"] == "run1"
    assert Run.open(folder).config.model.norm == "rmsnorm"  # type: ignore[union-attr]
    assert record.config["model.norm"] == '"rmsnorm"'
    losses = [row["val/loss"] for row in record.history if "val/loss" in row]
    assert losses
    assert all(isinstance(loss, float) for loss in losses)  # what the server reads to choose the next trial
