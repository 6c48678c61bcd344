"""The audit command: its verdicts, its files, and what a run says of its own training loss."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp import audit
from gptexp.runs.run import Run
from tests.conftest import TINY

SMALL = [setting for setting in TINY if setting.startswith(("data=", "hardware=", "model.", "heads=", "logger="))]


@pytest.fixture
def report(command: Callable[..., int], corpus: Path, tmp_path: Path) -> Callable[..., dict]:
    """Audits a small new model with more settings, and returns audit.json."""

    def run(*overrides: str) -> dict:
        folder = tmp_path / "audit"
        small = SMALL if overrides[0].startswith("norm") else ["data=file", "hardware=cpu"]
        assert command(*small, f"data.path={corpus}", f"audit_dir={folder}", *overrides, main=audit.main) == 0
        assert (folder / "audit.png").read_bytes().startswith(b"\x89PNG")
        return json.loads((folder / "audit.json").read_text())

    return run


@pytest.mark.parametrize(
    ("overrides", "looks_ahead", "couples"),
    [
        (["norm=layernorm"], False, False),
        (["norm=batchnorm", "model.norms.batchnorm.stats=[batch]"], False, True),
        (["model=bigram"], False, False),
        (["model=mlp", "norm=batchnorm"], True, True),
    ],
)
def test_verdicts(report: Callable[..., dict], overrides: list[str], looks_ahead: bool, couples: bool) -> None:
    found = report(*overrides)
    train, evaluation = found["modes"]["train"], found["modes"]["eval"]
    assert (train["looks_ahead"], train["couples"]) == (looks_ahead, couples)
    assert (evaluation["looks_ahead"], evaluation["couples"]) == (False, False)
    assert bool(train["layers"]) == (looks_ahead or couples)
    assert evaluation["layers"] == []
    assert found["generation"]["eval"] is None  # the same text alone and in a batch
    if "model.norms.batchnorm.stats=[batch]" in overrides:  # alone, a sequence has no statistics
        assert "fewer than two values" in found["generation"]["train"]


def test_a_run_is_audited_where_it_lies(
    tiny: Callable[..., Run], command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    run = tiny("run", "norm=batchnorm")
    assert run.info["train_loss"] == {"sees_later_tokens": True, "sees_other_sequences": True}
    out = capfd.readouterr().out
    assert "sees the tokens that it predicts" in out
    assert re.search(r"step 24/24 · loss that sees later tokens \d", out)
    before = run.checkpoint("best").read_bytes()
    assert command(f"run={run.path}", main=audit.main) == 0
    out = capfd.readouterr().out
    assert re.search(r"later tokens +│ YES, \d+\.\d+% of the gradient +│ no \(causal\)", out)
    found = json.loads((run.path / "audit.json").read_text())
    assert {d["layer"] for d in found["discrepancy"]} == {
        "blocks.0.residual1.before", "blocks.0.residual2.before", "norm_f"
    }  # fmt: skip
    assert found["loss"]["train"] != found["loss"]["eval"]
    assert run.checkpoint("best").read_bytes() == before


def test_a_causal_run_says_nothing_of_it(tiny: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    run = tiny("run")
    assert run.info["train_loss"] == {"sees_later_tokens": False, "sees_other_sequences": False}
    out = capfd.readouterr().out
    assert "sees" not in out


def test_train_and_eval_mode_agree_without_statistics(report: Callable[..., dict]) -> None:
    found = report("norm=rmsnorm", "model.dropout=0.3")
    assert found["loss"]["train"] == found["loss"]["eval"]
    assert found["discrepancy"] == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run=nowhere"], "run=nowhere: there is no such directory"),
        (["run=."], "run=.: is not a run directory (it holds no run.json and config.yaml)"),
        (["run=x", "norm=rmsnorm"], "norm=rmsnorm: has no effect with run=x, whose configuration is complete"),
        (["checkpoint=last"], "checkpoint=last: has no effect without run=DIR"),
        (["norm=rmsnrom"], "norm=rmsnrom: unknown; did you mean rmsnorm?"),
        (["norm=groupnorm", "model.norms.groupnorm.groups=3"],
         "model.norms.groupnorm.groups=3: must divide the 128 channels"),
        (["model.norms.batchnorm.groups=3"],
         "model.norms.batchnorm.groups=3: unknown key; allowed: eps, momentum, stats"),
        (["norm=batchnorm", "model.norms.batchnorm.stats=[time]"],
         "model.norms.batchnorm.stats=[time]: must be [batch,time] or [batch]"),
        (["placement=deepnorm", "model.residual=false"], "model.residual=false: model.placement=deepnorm weighs"),
    ],
)  # fmt: skip
def test_mistakes(
    arguments: list[str], line: str, command: Callable[..., int], capfd: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command(*arguments, main=audit.main) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {line}")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
