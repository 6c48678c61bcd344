"""What a run's callbacks write and save when it fails and goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptexp.errors import RunFailed
from gptexp.records import read_metrics
from gptexp.runs import Run
from gptexp.sample import load_model
from gptexp.training.launch import start
from gptexp.training.module import GPTModule
from gptexp.training.processes import processes
from tests.conftest import TINY, failing, timeless

Tiny = Callable[..., Run]


def test_a_run_stopped_before_its_second_checkpoint_goes_on_as_unbroken(
    tiny: Tiny, command: Callable[..., int], corpus: Path, tmp_path: Path
) -> None:
    """It evaluates the untrained model again, which must not count as an evaluation without progress."""
    whole = tiny("whole", "early_stop_patience=1")
    settings = [*TINY, f"data.path={corpus}", "early_stop_patience=1", f"hydra.run.dir={tmp_path / 'run'}"]
    with failing(3):
        assert command(*settings) == 1
    run = Run.open(tmp_path / "run")
    start(run, processes())
    assert timeless(run) == timeless(whole)
    assert run.result is not None
    assert whole.result is not None
    assert run.result["step"] == whole.result["step"] == 24


def test_the_rows_that_a_checkpoint_counts_must_be_there(
    command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A machine that lost its power may have kept the checkpoint and lost rows."""
    with failing(20):
        assert command(*TINY, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}") == 1
    path = tmp_path / "run" / "metrics.csv"
    held = path.read_bytes()[:100]
    path.write_bytes(held)
    capfd.readouterr()
    assert command(f"resume={path.parent}") == 2
    assert capfd.readouterr().err.startswith(f"error: {path}: holds 100 bytes, and ")
    assert path.read_bytes() == held


def test_the_error_of_a_run_keeps_no_model_alive(corpus: Path, tmp_path: Path, command: Callable[..., int]) -> None:
    """A sweep keeps the errors of its jobs, and may have no memory for a second model."""
    run = tmp_path / "run"
    with failing(20):
        assert command(*TINY, f"data.path={corpus}", f"hydra.run.dir={run}") == 1
    with failing(20), pytest.raises(RunFailed) as caught:
        start(Run.open(run), processes())
    assert caught.value.__cause__ is not None
    trace, frames = caught.value.__cause__.__traceback__, 0
    while trace is not None:
        assert not any(isinstance(v, torch.nn.Module) for v in trace.tb_frame.f_locals.values())
        trace, frames = trace.tb_next, frames + 1
    assert frames > 5


def test_the_peak_is_timed_after_the_first_evaluation_when_other_programs_have_started(
    command: Callable[..., int], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once in a resumed run, which evaluates nothing at its start."""
    evaluated: list[int] = []
    evaluate = GPTModule.on_validation_epoch_end

    def counted(module: GPTModule) -> None:
        evaluated.append(1)
        evaluate(module)

    monkeypatch.setattr(GPTModule, "on_validation_epoch_end", counted)
    monkeypatch.setattr("gptexp.training.fit.peak_flops", lambda *_: 1e9 * len(evaluated))

    # After evaluations at steps 0, 8 and 16, and a last checkpoint at 15.
    with failing(20):
        assert command(*TINY, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}") == 1
    run = Run.open(tmp_path / "run")
    start(run, processes())
    flops = load_model(run, "last", len(run.info["tokenizer"]["symbols"])).flops_per_token()
    for row in read_metrics(run.metrics_path)[1:]:
        peak = 1e9 if row["step"] <= 15 else 3e9
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / peak)


def test_a_runfailing_its_last_step_only_writes_its_results(
    tiny: Tiny, command: Callable[..., int]
) -> None:
    """Between the last checkpoint and the final status, with and without an early stop."""
    for name, overrides in (
        ("whole", []),
        ("early", ["optimizer.learning_rate=1e-12", "early_stop_patience=2", "eval_interval=4"]),
    ):
        run = tiny(name, *overrides)
        before, result = timeless(run), run.result
        run.update(status="running")
        (run.path / "result.json").unlink()
        assert command(f"resume={run.path}") == 0
        assert timeless(run) == before
        assert run.info["status"] == "done"
        assert run.result == result
