"""What the recorder writes, when a run fails between its rows and goes on, and when it looks at numbers later."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gptexp.training.callbacks.recorder import Recorder

from gptexp.errors import RunFailed
from gptexp.records import read_metrics
from gptexp.runs import Run
from gptexp.sample import load_model
from gptexp.train import start
from gptexp.training.callbacks import recorder
from gptexp.training.module import GPTModule
from tests.conftest import TINY, timeless

Tiny = Callable[..., Run]


@contextmanager
def _killed_after(step: int) -> Iterator[None]:
    """In here a run fails after this step's row is written, and before a checkpoint of it."""
    record = Recorder.on_train_batch_end

    def killed(recorder: Recorder, trainer: Any, *args: Any) -> None:
        record(recorder, trainer, *args)
        if trainer.global_step == step:
            raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "on_train_batch_end", killed)
        yield


def test_a_run_stopped_before_its_second_checkpoint_goes_on_as_unbroken(
    tiny: Tiny, command: Callable[..., int], corpus: Path, tmp_path: Path
) -> None:
    """It evaluates the untrained model again, which must not count as an evaluation without progress."""
    whole = tiny("whole", "early_stop_patience=1")
    settings = [*TINY, f"data.path={corpus}", "early_stop_patience=1", f"hydra.run.dir={tmp_path / 'run'}"]
    with _killed_after(3):
        assert command(*settings) == 1
    run = Run.open(tmp_path / "run")
    start(run)
    assert timeless(run) == timeless(whole)
    assert run.result is not None
    assert whole.result is not None
    assert run.result["step"] == whole.result["step"] == 24


def test_the_rows_that_a_checkpoint_counts_must_be_there(
    command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A machine that lost its power may have kept the checkpoint and lost rows."""
    with _killed_after(20):
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
    with _killed_after(20):
        assert command(*TINY, f"data.path={corpus}", f"hydra.run.dir={run}") == 1
    with _killed_after(20), pytest.raises(RunFailed) as caught:
        start(Run.open(run))
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
    evaluate = GPTModule.evaluate

    def counted(module: GPTModule, batches: object) -> dict[str, float]:
        evaluated.append(1)
        return evaluate(module, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(GPTModule, "evaluate", counted)
    monkeypatch.setattr("gptexp.training.fit.peak_flops", lambda *_: 1e9 * len(evaluated))

    # After evaluations at steps 0, 8 and 16, and a last checkpoint at 15.
    with _killed_after(20):
        assert command(*TINY, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}") == 1
    run = Run.open(tmp_path / "run")
    start(run)
    flops = load_model(run, "last", len(run.info["tokenizer"]["symbols"])).flops_per_token()
    for row in read_metrics(run.metrics_path)[1:]:
        peak = 1e9 if row["step"] <= 15 else 3e9
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / peak)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has what follows look at numbers a log row later, as on a GPU."""

    def begin() -> None:
        monkeypatch.setattr(recorder, "LATER", ("cpu",))
        monkeypatch.setattr(recorder, "_on_the_way", lambda numbers: lambda: [float(n) for n in numbers])

    return begin


def test_numbers_looked_at_later_are_the_same(
    tiny: Tiny, later: Callable[[], None], command: Callable[..., int], corpus: Path, tmp_path: Path
) -> None:
    """Whole, and killed after steps whose row is still to be written, before and after a checkpoint between rows."""
    whole = tiny("whole")
    later()
    for step in (4, 7, 13, 19, 20):
        path = tmp_path / f"run{step}"
        with _killed_after(step):
            assert command(*TINY, f"data.path={corpus}", f"hydra.run.dir={path}") == 1
        rows = [row["step"] for row in read_metrics(path / "metrics.csv")]
        assert rows == [s for s in (0, 3, 6, 8, 9, 12, 15, 16, 18) if s < step - 1]  # the last is still to come
        start(Run.open(path))
        assert timeless(Run.open(path)) == timeless(whole)
    again = tiny("again")
    assert timeless(again) == timeless(whole)
    assert again.samples_path.read_bytes() == whole.samples_path.read_bytes()


@pytest.mark.parametrize("interval", [1, 4, 24])
def test_a_divergence_seen_later_stops_the_run_and_is_never_saved(
    interval: int, tiny: Tiny, later: Callable[[], None]
) -> None:
    later()
    steep = ["optimizer=sgd", "optimizer.learning_rate=1e4", "grad_clip=0", "norm=none"]
    run = tiny("run", *steep, f"checkpoint_interval={interval}", "eval_interval=24", "log_interval=2")
    assert run.info["status"] == "diverged"
    rows = read_metrics(run.metrics_path)
    assert rows[-1]["step"] < 24
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert sum(not math.isfinite(row["grad_norm"]) for row in rows[1:]) >= 1
    kept = torch.load(run.checkpoint("last"), weights_only=True)
    assert all(bool(v.isfinite().all()) for v in kept["state_dict"].values())


def test_a_run_killed_after_its_last_step_only_writes_its_results(
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
