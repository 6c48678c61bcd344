"""Saves checkpoints/last and checkpoints/best, and the length of the files that belong to them."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy

from gptexp.loggers.metrics_csv import MetricsCSV
from gptexp.records import cut
from gptexp.runs import Run
from gptexp.training.callbacks.evaluations import evaluation_due


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that a crash at any moment leaves the old file or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the file, and put that in its place once it is on the disk."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.saving")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def save_durably(trainer: Trainer, path: Path) -> None:
    """Save a checkpoint so that a crash at any moment leaves the old one or the new one; every rank calls this.

    A model that is shared out among processes becomes a directory, to which each of them writes its part; path is then
    a link to it, which is put in place once all of it is on the disk.
    """
    if not isinstance(trainer.strategy, FSDPStrategy):  # `DurableCheckpointIO` does so
        trainer.save_checkpoint(path)
        return
    folder = path.with_name(trainer.strategy.broadcast(f".{path.name}.{uuid4().hex}"))
    trainer.save_checkpoint(folder)
    if trainer.is_global_zero:
        publish(folder, path)


def publish(folder: Path, path: Path) -> None:
    """Make a link to a directory beside it, and remove the directories before it.

    The link takes the place of the one that is there, or of a directory, as in a copy of a run.
    """
    for file in folder.iterdir():
        with file.open("rb") as content:
            os.fsync(content.fileno())
    link = path.with_name(f".{path.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    if path.is_dir() and not path.is_symlink():  # a copy of a run in which links were followed
        path.rename(path.with_name(f".{path.name}.copy"))
    link.replace(path)
    for other in path.parent.glob(f".{path.name}.*"):
        if other.name != folder.name:
            shutil.rmtree(other)


class RunCheckpoints(ModelCheckpoint):
    """Keeps best.ckpt, the lowest validation loss, and last.ckpt, from which a run is resumed.

    `best` is replaced before `last`, which is saved every `interval` steps. A run killed between the two resumes from
    the older `last`, comes to the same evaluation and writes the same `best` again. The untrained model is saved, too,
    so a run has both checkpoints from its first evaluation on, and run.json says so: one that is missing later is lost.
    Each holds the fingerprint of its configuration, and the length of the run's growing files, which are cut back to it
    when the run is resumed, so that they end as an unbroken run's would.
    """

    def __init__(self, run: Run, record: MetricsCSV, fingerprint: str, monitor: str, interval: int) -> None:
        folder = run.checkpoint("last").parent.absolute()
        super().__init__(dirpath=folder, filename="best", monitor=monitor, every_n_train_steps=interval,
                         save_on_train_epoch_end=False)  # fmt: skip
        self.run, self.record, self.fingerprint, self.interval = run, record, fingerprint, interval
        self.saved_at = -1

    def state_dict(self) -> dict[str, Any]:
        """The lowest loss so far; the paths are known."""
        return {"best_model_score": self.best_model_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the lowest loss of a checkpoint."""
        self.best_model_score = state_dict["best_model_score"]
        self.best_model_path, self.last_model_path = (str(self.run.checkpoint(n)) for n in ("best", "last"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save `last` where it is due and no evaluation follows, which would belong to it."""
        if trainer.global_step % self.interval == 0 and not evaluation_due(trainer):
            self.save_latest(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due after an evaluation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        step, loss = trainer.global_step, trainer.callback_metrics[str(self.monitor)]
        if self.monitor == "val/loss" or not trainer.should_stop:  # else the evaluation of the whole split follows
            self.record.flush()
        self.current_score = loss
        if self.best_model_score is None or loss < self.best_model_score:
            self.best_model_score, self.best_model_path = loss.clone(), str(self.run.checkpoint("best"))
            save_durably(trainer, Path(self.best_model_path))
            self._tell(trainer)
        if step % self.interval == 0 or trainer.should_stop:
            self.save_latest(trainer)
        if step == 0 and trainer.is_global_zero:
            self.run.update(resumable=True)

    def save_latest(self, trainer: Trainer) -> None:
        """Save `last`, unless this step's is saved already."""
        if self.saved_at == trainer.global_step or trainer.fast_dev_run:
            return
        self.saved_at, self.last_model_path = trainer.global_step, str(self.run.checkpoint("last"))
        save_durably(trainer, Path(self.last_model_path))
        self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the run's identity, the lengths of what is on the disk for good, and the row that is still to come."""
        sizes = {}
        if trainer.is_global_zero:
            for path in self.run.growing:
                with suppress(FileNotFoundError), path.open("rb") as file:
                    os.fsync(file.fileno())
                    sizes[path.name] = file.seek(0, os.SEEK_END)
        checkpoint["gptexp"] = {"config": self.fingerprint, "sizes": sizes, "row": self.record.row}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Cut the files back, and take up the row.

        Raises:
            UserError: for a file that has lost rows.
        """
        if trainer.is_global_zero and trainer.state.fn == "fit":
            for path in self.run.growing:
                cut(path, checkpoint["gptexp"]["sizes"].get(path.name, 0))
            self.record.row = checkpoint["gptexp"].get("row", {})
