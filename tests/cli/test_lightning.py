"""What a Lightning user knows, from the command line: any callback, any argument of the Trainer, any logger."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptexp.processes.group import processes
from gptexp.runs.files import read_metrics
from gptexp.runs.run import Run
from gptexp.training.launch import start
from tests.conftest import TINY, failing, timeless

Tiny = Callable[..., Run]
CALLBACKS = "lightning.pytorch.callbacks"


def column(run: Run, name: str) -> dict[int, float]:
    """A column of the file of Lightning's CSVLogger (logger=csv)."""
    with (run.path / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_stock_callbacks_by_their_target(tiny: Tiny, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    run = tiny(
        "run", "logger=csv", "log_interval=1", f"+callbacks.lr._target_={CALLBACKS}.LearningRateMonitor",
        f"+callbacks.keep._target_={CALLBACKS}.ModelCheckpoint", "+callbacks.keep.monitor=val/loss",
        f"+callbacks.keep.dirpath={kept}", "+callbacks.keep.filename='{step}'", "+callbacks.keep.save_top_k=2",
    )  # fmt: skip
    rows = read_metrics(run.metrics_path)
    losses = {int(row["step"]): row["val/loss"] for row in rows if row["step"] and "val/loss" in row}
    lowest = sorted(losses, key=lambda step: losses[step])[:2]
    assert {p.name for p in kept.iterdir()} == {f"step={step}.ckpt" for step in lowest}
    rates = column(run, "lr-AdamW/pg1")
    assert {s + 1: rate for s, rate in rates.items()} == {row["step"]: row["learning_rate"] for row in rows[1:]}
    assert column(run, "val/loss") == {0: rows[0]["val/loss"], **losses}


def test_stock_early_stopping(tiny: Tiny) -> None:
    run = tiny("run", "callbacks=early_stopping", "callbacks.early_stopping.patience=1",
               "optimizer.learning_rate=1e-12", "eval_interval=4")  # fmt: skip
    assert read_metrics(run.metrics_path)[-1]["step"] == 4
    assert run.result is not None
    assert (run.info["status"], run.result["stopped_early"]) == ("done", True)


@pytest.mark.slow
def test_groups_of_callbacks(tiny: Tiny, command: Callable[..., int], corpus: Path, tmp_path: Path) -> None:
    """An average of the weights is what is evaluated and saved, and goes on to the bit after a kill."""
    plain, run = tiny("plain"), tiny("run", "callbacks=[ema,lr_monitor]", "logger=csv", "callbacks.ema.decay=0.9")
    a, b = ([row["val/loss"] for row in read_metrics(r.metrics_path) if "val/loss" in row] for r in (plain, run))
    assert a[0] == b[0]
    assert a[1:] != b[1:]
    assert [row["train/loss"] for row in read_metrics(plain.metrics_path)[1:] if "train/loss" in row] == [
        row["train/loss"] for row in read_metrics(run.metrics_path)[1:] if "train/loss" in row
    ]
    settings = [*TINY, f"data.path={corpus}", "callbacks=[ema,lr_monitor]", "logger=csv", "callbacks.ema.decay=0.9"]
    with failing(20):
        assert command(*settings, f"hydra.run.dir={tmp_path / 'killed'}") == 1
    killed = Run.open(tmp_path / "killed")
    start(killed, processes())
    assert timeless(killed) == timeless(run)
    ours, theirs = (torch.load(r.checkpoint("last"), weights_only=True)["state_dict"] for r in (killed, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_gradients_accumulate_by_a_scheduler(tiny: Tiny) -> None:
    """Two micro-batches of four rows a step from the first epoch on: twice the tokens."""
    run = tiny("run", f"+callbacks.more._target_={CALLBACKS}.GradientAccumulationScheduler",
               "+callbacks.more.scheduling={0:2}")  # fmt: skip
    rows = read_metrics(run.metrics_path)
    assert rows[-1]["step"] == 24
    assert rows[-1]["tokens"] == 24 * 2 * 4 * 16


def test_arguments_of_the_trainer(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    run = tiny("run", "trainer.profiler=simple", "trainer.limit_val_batches=1", "eval_batch_size=4")
    assert "run_training_batch" in capfd.readouterr().out
    few, whole = (read_metrics(r.metrics_path)[-1]["val/loss"] for r in (run, tiny("whole")))
    assert few != whole


def test_both_names_of_a_setting_make_the_same_run(
    command: Callable[..., int], corpus: Path, tmp_path: Path
) -> None:
    long = ["trainer.max_steps=12", "trainer.gradient_clip_val=0.5", "trainer.val_check_interval=8",
            "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=2"]  # fmt: skip
    short = ["max_steps=12", "grad_clip=0.5", "eval_interval=4", "gradient_accumulation_steps=2", "log_interval=2"]
    named = ("max_steps", "eval_interval", "log_interval")
    common = [*(s for s in TINY if not s.startswith(named)), f"data.path={corpus}"]
    runs = []
    for name, settings in (("one", long), ("other", short)):
        assert command(*common, *settings, f"hydra.run.dir={tmp_path / name}") == 0
        runs.append(Run.open(tmp_path / name))
    one, other = runs
    assert timeless(one) == timeless(other)
    assert one.info["fingerprints"]["config"] == other.info["fingerprints"]["config"]


def test_fast_dev_run_records_nothing(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    run = tiny("run", "trainer.fast_dev_run=true", "logger=[csv,tensorboard]")
    assert "nothing was evaluated" in capfd.readouterr().out
    assert not run.metrics_path.exists()
    assert not list(run.checkpoint("last").parent.iterdir())
    assert run.result is not None
    assert run.result["step"] == 1
    assert run.result["best_val_loss"] is None


def test_epochs_of_lightning(tiny: Tiny) -> None:
    run = tiny("run", "trainer.max_epochs=2", "trainer.limit_train_batches=5", "trainer.check_val_every_n_epoch=1",
               "eval_interval=5")  # fmt: skip
    assert [row["step"] for row in read_metrics(run.metrics_path) if "val/loss" in row] == [0, 5, 10]
    assert run.result is not None
    assert not run.result["stopped_early"]


def test_overfitting_a_batch(tiny: Tiny) -> None:
    run = tiny("run", "trainer.overfit_batches=1", "trainer.max_epochs=-1", "max_steps=150", "eval_interval=50",
               "optimizer.learning_rate=1e-2")  # fmt: skip
    assert read_metrics(run.metrics_path)[-1]["train/loss"] < 1.5


def test_anomalies_are_detected(command: Callable[..., int], corpus: Path, tmp_path: Path) -> None:
    settings = [*TINY, f"data.path={corpus}", "optimizer=sgd", "optimizer.learning_rate=1e38", "grad_clip=0"]
    assert command(*settings, "trainer.detect_anomaly=true", f"hydra.run.dir={tmp_path / 'run'}") == 1
    assert "nan values" in Run.open(tmp_path / "run").info["error"]


BAD = [
    ("+callbacks.x._target_=nowhere.Thing", "callbacks.x._target_=nowhere.Thing: cannot be imported (No module named"),
    ("+callbacks.x._target_=torch.nn.Linear", "callbacks.x._target_=torch.nn.Linear: is no Callback of Lightning"),
    ("+callbacks.x.monitor=val/loss", "callbacks.x: lacks _target_"),
    ("callbacks=[ema] callbacks.ema.decoy=1", "callbacks.ema.decoy"),
    (f"+callbacks.x._target_={CALLBACKS}.EarlyStopping", f"callbacks.x.monitor: is missing; {CALLBACKS}.EarlyStopping"),
    (f"+callbacks.x._target_={CALLBACKS}.EarlyStopping +callbacks.x.monitor=a +callbacks.x.patients=3",
     f"callbacks.x.patients=3: {CALLBACKS}.EarlyStopping takes no such argument; did you mean patience?"),
    ("+logger.x._target_=lightning.pytorch.callbacks.Timer",
     "logger.x._target_=lightning.pytorch.callbacks.Timer: is no Logger of Lightning"),
    ("trainer.fast_dev_runs=true", "trainer.fast_dev_runs=true: unknown key; did you mean trainer.fast_dev_run?"),
    ("trainer.profiler=quick", "trainer.profiler=quick: must be one of simple, advanced, pytorch, xla"),
    ("trainer.max_time=soon", "trainer:"),
    ("trainer.max_steps=10 max_steps=20", "max_steps=20: trainer.max_steps=10 sets max_steps, too; leave one "),
    ("trainer.val_check_interval=5 trainer.accumulate_grad_batches=2", "trainer.val_check_interval=5: must be"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "line"), BAD)
def test_mistakes(
    overrides: str, line: str, command: Callable[..., int], corpus: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings = [*(s for s in TINY if not s.startswith(("max_steps", "eval_interval"))), f"data.path={corpus}"]
    assert command(*settings, *overrides.split(), f"hydra.run.dir={tmp_path / 'run'}") == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith(f"error: {line}")
    assert not (tmp_path / "run").exists()


def test_a_stored_class_of_another_package_must_be_named_again(
    command: Callable[..., int], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "strange.py").write_text(
        "from lightning.pytorch import Callback\nclass Strange(Callback):\n"
        "    def on_train_start(self, *_):\n        open('was_here', 'w').close()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    own = "+callbacks.mine._target_=strange.Strange"
    with failing(20):
        assert command(*TINY, f"data.path={corpus}", own, f"hydra.run.dir={tmp_path / 'run'}") == 1
    (tmp_path / "was_here").unlink()
    sys.modules.pop("strange")
    capfd.readouterr()
    assert command(f"resume={tmp_path / 'run'}") == 2
    assert capfd.readouterr().err == (
        f"error: resume={tmp_path / 'run'}: its config.yaml names callbacks.mine._target_=strange.Strange, which would "
        f"be run; to allow it, add {own} to the command\n"
    )
    assert "strange" not in sys.modules
    assert command(f"resume={tmp_path / 'run'}", own) == 0
    assert (tmp_path / "was_here").exists()
