"""As in a notebook: a stock Trainer with GPTModule and CharDataModule, and nothing else of gptexp."""

import json
from collections.abc import Callable
from math import cos, pi
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.tuner.tuning import Tuner

from gptexp.data.datamodule import CharDataModule
from gptexp.training.module import GPTModule

pytestmark = pytest.mark.filterwarnings("ignore")

Make = Callable[..., Trainer]


@pytest.fixture
def data(corpus: Path) -> CharDataModule:
    return CharDataModule({"name": "file", "path": str(corpus)}, block_size=16, batch_size=4)


def module(data: CharDataModule, learning_rate: float = 1e-2, **model: Any) -> GPTModule:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": data.vocab_size}
    return GPTModule(sizes | model, {"learning_rate": learning_rate}, {"name": "cosine", "warmup_steps": 3})


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A Trainer of a few steps that evaluates every five."""

    def trainer(*callbacks: Callback, **options: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "max_steps": 20, "val_check_interval": 5, "check_val_every_n_epoch": None, "log_every_n_steps": 2,
            "accelerator": "cpu", "default_root_dir": tmp_path, "enable_progress_bar": False,
            "enable_model_summary": False, "logger": CSVLogger(tmp_path, "csv", "run"),
        }  # fmt: skip
        return Trainer(callbacks=list(callbacks), **defaults | options)

    return trainer


def column(tmp_path: Path, name: str) -> dict[int, float]:
    """A column of Lightning's CSV file, by step."""
    table = pd.read_csv(tmp_path / "csv" / "run" / "metrics.csv").set_index("step")
    return table[name].dropna().to_dict()


def test_fit_and_validate_log_the_losses(data: CharDataModule, make: Make, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", monitor="val/loss", save_top_k=2)
    trainer, model = make(keep), module(data)
    trainer.fit(model, data)
    train, val = column(tmp_path, "train/loss"), column(tmp_path, "val/loss")
    assert list(train) == list(range(2, 21, 2))
    assert list(val) == [5, 10, 15, 20]
    assert train[20] < train[2] - 0.2
    assert float(trainer.callback_metrics["val/loss"]) == val[20] < val[5]
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(train[20])
    losses, count = 0.0, 0  # every target of the split once, by torch's own loss
    with torch.no_grad():
        for batch in data.val_dataloader(whole=True):
            losses += float(torch.nn.functional.cross_entropy(
                model(batch.x).flatten(0, 1), batch.y.flatten(), ignore_index=-1, reduction="sum"))  # fmt: skip
            count += int((batch.y >= 0).sum())
    assert val[20] == pytest.approx(losses / count, rel=1e-5)
    # The checkpoints with the lowest losses are kept, and have these losses.
    lowest = sorted(val, key=lambda step: val[step])[:2]
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {f"step={step}.ckpt" for step in lowest}
    best = GPTModule.load_from_checkpoint(keep.best_model_path)
    (found,) = make(logger=False).validate(best, data, verbose=False)
    assert found["val/loss"] == float(keep.best_model_score) == val[lowest[0]]


def test_load_from_checkpoint_gives_the_model(data: CharDataModule, make: Make, tmp_path: Path) -> None:
    model = module(data, norm="batchnorm", dropout=0.1)
    trainer = make(max_steps=2)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    stored = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert json.loads(json.dumps(stored["hyper_parameters"])) == stored["hyper_parameters"]
    other = GPTModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert other.model.config == model.model.config
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        assert torch.equal(other.eval()(batch.x), model.eval()(batch.x))


def test_early_stopping_stops_a_run_that_gets_worse(data: CharDataModule, make: Make, tmp_path: Path) -> None:
    stop = EarlyStopping("val/loss", patience=2)
    trainer = make(stop, max_steps=200)
    trainer.fit(module(data, learning_rate=3.0), data)
    losses = list(column(tmp_path, "val/loss").values())
    assert trainer.global_step == 5 * len(losses) < 200
    assert min(losses) == losses[-3]
    assert stop.wait_count == 2


def test_the_monitored_learning_rate_is_the_schedule(data: CharDataModule, make: Make, tmp_path: Path) -> None:
    make(LearningRateMonitor("step"), log_every_n_steps=1).fit(module(data), data)
    expected = {s: 1e-2 * ((s + 1) / 4 if s < 3 else 0.1 + 0.9 * (1 + cos(pi * (s - 3) / 17)) / 2) for s in range(20)}
    assert column(tmp_path, "lr-AdamW/pg1") == pytest.approx(expected)
    # What the module logs is the rate that the step was made with.
    assert column(tmp_path, "learning_rate") == pytest.approx({s + 1: rate for s, rate in expected.items()})


def test_an_average_of_the_weights(data: CharDataModule, make: Make) -> None:
    """Kept here by hand, from the weights after each step."""
    average: list[torch.Tensor] = []

    class ByHand(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            weights = [p.detach().clone() for p in pl_module.parameters()]
            average[:] = [0.8 * a + 0.2 * w for a, w in zip(average, weights, strict=True)] if average else weights

    model = module(data)
    make(EMAWeightAveraging(decay=0.8), ByHand()).fit(model, data)
    for p, mean in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(p.detach(), mean, rtol=1e-4, atol=1e-6)


class Seen(Callback):
    """The first ids of every training batch, and the number of optimizer steps before it."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[int]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append((trainer.global_step, batch.x.flatten().tolist()))


def test_gradients_accumulate_by_a_scheduler(data: CharDataModule, make: Make) -> None:
    seen = Seen()
    epochs = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 4, "val_check_interval": None,
              "check_val_every_n_epoch": 1}  # fmt: skip
    trainer = make(GradientAccumulationScheduler({0: 1, 1: 2}), seen, **epochs)
    trainer.fit(module(data), data)
    assert [step for step, _ in seen.batches] == [0, 1, 2, 3, 4, 4, 5, 5]
    assert len({tuple(ids) for _, ids in seen.batches}) == 8
    assert trainer.global_step == 6


def test_the_learning_rate_finder(data: CharDataModule, make: Make) -> None:
    model, trainer = module(data), make()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    finder = Tuner(trainer).lr_find(model, datamodule=data, min_lr=1e-5, max_lr=1.0, num_training=30)
    assert finder is not None
    assert len(finder.results["lr"]) == 30
    assert finder.results["lr"][-1] > 0.5
    assert model.learning_rate == finder.suggestion()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    trainer.fit(model, data)
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == finder.suggestion()


def test_fast_dev_run_and_overfitting(data: CharDataModule, make: Make, tmp_path: Path) -> None:
    seen = Seen()
    make(seen, fast_dev_run=2).fit(module(data), data)
    assert [step for step, _ in seen.batches] == [0, 1]
    assert not (tmp_path / "csv").exists()
    seen = Seen()
    trainer = make(seen, overfit_batches=1, max_epochs=60, max_steps=-1, val_check_interval=None,
                   check_val_every_n_epoch=20, log_every_n_steps=1)  # fmt: skip
    trainer.fit(module(data), data)
    assert len({tuple(ids) for _, ids in seen.batches}) == 1
    assert trainer.global_step == 60
    assert float(trainer.callback_metrics["train/loss"]) < 1.5


def test_a_profiler(data: CharDataModule, make: Make, tmp_path: Path) -> None:
    make(profiler=SimpleProfiler(tmp_path, "times")).fit(module(data), data)
    (report,) = tmp_path.glob("fit-times*.txt")
    (line,) = [line for line in report.read_text().splitlines() if "run_training_batch" in line]
    assert line.split("|")[3].strip() == "20"


def test_anomalies_are_detected(data: CharDataModule, make: Make) -> None:
    model = module(data)
    torch.nn.init.constant_(model.model.wte.weight, float("inf"))
    with pytest.raises(RuntimeError, match="returned nan values"):
        make(detect_anomaly=True).fit(model, data)


@pytest.mark.slow  # MLflow takes many seconds to set up its database
def test_four_loggers_at_once(data: CharDataModule, make: Make, tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from wandb import teardown

    teardown()  # an earlier test of this process may have begun an online run
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    wandb = WandbLogger(save_dir=tmp_path, offline=True, project="notebook")
    mlflow = MLFlowLogger("notebook", tracking_uri=store)
    loggers = [CSVLogger(tmp_path, "csv", "run"), TensorBoardLogger(tmp_path, "tb", "run"), wandb, mlflow]
    make(logger=loggers).fit(module(data), data)
    losses = column(tmp_path, "val/loss")
    assert list(losses) == [5, 10, 15, 20]
    events = EventAccumulator(str(tmp_path / "tb" / "run"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("val/loss")} == pytest.approx(losses)
    history = MlflowClient(store).get_metric_history(mlflow.run_id, "val/loss")
    assert {m.step: m.value for m in history} == pytest.approx(losses)
    assert wandb.experiment.summary["val/loss"] == pytest.approx(losses[20])
    assert wandb.experiment.summary["trainer/global_step"] == 20
    wandb.experiment.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
