"""Training for a given time: when it ends, what the learning rate does, and how a killed run goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer

from gptexp.config.schema import read_config
from gptexp.data.datamodule import CharDataModule
from gptexp.errors import UserError
from gptexp.runs.files import read_metrics
from gptexp.runs.run import Run
from gptexp.training.callbacks.evaluations import Evaluations
from gptexp.training.callbacks.time_budget import TimeBudget
from gptexp.training.module import GPTModule
from tests.cli.test_interruption import kill, wait_until
from tests.conftest import TINY, finish, spawn

Tiny = Callable[..., Run]


class Clock:
    """Goes on by a tenth of a second whenever it is read."""

    reads = 0

    @property
    def elapsed(self) -> float:
        self.reads += 1
        return (self.reads - 1) / 10


class Rates(Callback):
    """Collects the learning rate of each step, and when evaluations are made."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.evaluated: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: GPTModule, *_: object) -> None:  # type: ignore[override]
        if trainer.global_step > len(self.rates):
            self.rates.append(pl_module.rate)

    def on_validation_end(self, trainer: Trainer, pl_module: GPTModule) -> None:  # type: ignore[override]
        self.evaluated.append(trainer.global_step)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_schedule_follows_the_clock(corpus: Path, micro_batches: int) -> None:
    """Two seconds are over before the 21st step begins, which is the last one."""
    data = CharDataModule({"name": "file", "path": str(corpus)}, block_size=8, batch_size=4, accumulate=micro_batches)
    model = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "vocab_size": data.vocab_size}
    module = GPTModule(model, {"learning_rate": 1.0}, {"name": "linear", "warmup_steps": 0, "min_lr_ratio": 0.0})
    seen = Rates()
    trainer = Trainer(
        max_steps=-1, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=1000,
        check_val_every_n_epoch=None, accumulate_grad_batches=micro_batches,
        callbacks=[Evaluations(), TimeBudget(2.0, Clock()), seen],  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.global_step == 21
    assert seen.evaluated == [0, 21]
    # Each step takes a tenth of a second by this clock, so that there will be 20 steps as far as anyone can tell.
    assert seen.rates == pytest.approx([1.0, 1.0, *(1 - step / 20 for step in range(2, 21))], abs=1e-6)


def test_it_ends_with_the_step_in_which_the_time_is_over(tiny: Tiny) -> None:
    run = tiny("run", "max_seconds=0.7", "max_steps=null", "log_interval=1")
    rows, result = read_metrics(run.metrics_path), run.result or {}
    assert all(row["seconds"] < 0.7 for row in rows[1:-2])  # however few steps a busy machine makes
    assert rows[-1]["seconds"] >= 0.7
    assert {"train/loss", "val/loss", "learning_rate"} <= rows[-1].keys()
    assert (result["status"], result["stopped_early"], result["step"]) == ("done", False, rows[-1]["step"])
    assert result["tokens"] == 4 * 16 * result["step"]


def test_steps_that_end_it_before(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny("run", "max_seconds=600")
    assert (run.result or {})["step"] == 24
    assert "max_steps=24 ended training after " in caplog.text


@pytest.mark.slow
def test_killed_and_resumed_it_takes_the_time_that_is_left(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [*TINY, f"data.path={corpus}", "max_seconds=4", "max_steps=null", "checkpoint_interval=20",
                "eval_interval=100", "sample_tokens=0", "model.n_embd=64"]  # fmt: skip
    process = spawn(*settings, f"hydra.run.dir={folder}", cwd=tmp_path)
    last = folder / "checkpoints" / "last.ckpt"
    first: list[float] = []

    def saved_again() -> bool:
        if last.exists():
            first.append(last.stat().st_mtime)
        return bool(first) and first[-1] > first[0]

    wait_until(saved_again, process)
    kill(process)
    code, _, err = finish(spawn(f"resume={folder}", cwd=tmp_path))
    assert code == 0, err
    rows = read_metrics(folder / "metrics.csv")
    assert all(row["seconds"] < 4 for row in rows[1:-2])
    assert rows[-1]["seconds"] >= 4
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    assert seconds == sorted(seconds)
    code, _, err = finish(spawn(f"resume={folder}", cwd=tmp_path))
    assert (code, "this run is done" in err) == (2, True)


@pytest.mark.slow
def test_two_processes_end_together(corpus: Path, tmp_path: Path) -> None:
    settings = [*TINY, f"data.path={corpus}", "max_seconds=1", "max_steps=null", "hardware=ddp_cpu", "log_interval=1"]
    code, _, err = finish(spawn(*settings, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path))
    assert code == 0, err
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert all(row["seconds"] < 1 for row in rows[1:-2])
    assert rows[-1]["seconds"] >= 1


@pytest.mark.parametrize(("settings", "problem"), [
    ({"max_steps": None}, "max_steps=null: needs max_seconds"),
    ({"max_seconds": 0}, "max_seconds=0: must be a number greater than 0"),
    ({"max_seconds": 5, "model": {"name": "counts"}}, "max_seconds=5.0: has no effect with model.name=counts, which"),
])  # fmt: skip
def test_budgets_that_are_none(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(settings)
    assert caught.value.problems[0].startswith(problem)
