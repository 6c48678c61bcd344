"""Saves checkpoints/last and checkpoints/best, and the length of the files that belong to them."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from gptexp.loggers.metrics_csv import MetricsCSV
from gptexp.runs.files import cut
from gptexp.runs.run import Run
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


class RunCheckpoints(ModelCheckpoint):
    """Keeps best.ckpt, the lowest validation loss, and last.ckpt, from which a run is resumed.

    `last` is saved every `interval` steps, after `best`. A run killed between the two resumes from the older `last`,
    repeats the evaluation and writes the same `best` again. The untrained model is saved, too, so that a run has both
    from its first evaluation on; run.json then says `resumable`, so that a lost checkpoint is noticed.
    Each holds the fingerprint of its configuration, whether a callback has stopped the run, and the lengths of the
    run's growing files. On resuming these are cut back to that, and so end up byte-identical to an unbroken run's.
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
        """Continue from a checkpoint's lowest loss."""
        self.best_model_score = state_dict["best_model_score"]
        self.best_model_path, self.last_model_path = (str(self.run.checkpoint(n)) for n in ("best", "last"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save `last` where it is due; if an evaluation follows, after that."""
        if trainer.global_step % self.interval == 0 and not evaluation_due(trainer):
            self.save_latest(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due after an evaluation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        loss = trainer.callback_metrics[str(self.monitor)]
        if self.monitor == "val/loss" or not trainer.should_stop:  # else the evaluation of the whole split follows
            self.record.flush()
        self.current_score = loss
        if self.best_model_score is None or loss < self.best_model_score:
            self.best_model_score, self.best_model_path = loss.clone(), str(self.run.checkpoint("best"))
            self._save(trainer, self.best_model_path)
        if trainer.global_step % self.interval == 0 or trainer.should_stop:
            self.save_latest(trainer)
        if trainer.global_step == 0 and trainer.is_global_zero:
            self.run.update(resumable=True)

    def save_latest(self, trainer: Trainer) -> None:
        """Save `last`, unless this step's is saved already."""
        if self.saved_at != trainer.global_step and not trainer.fast_dev_run:
            self.saved_at, self.last_model_path = trainer.global_step, str(self.run.checkpoint("last"))
            self._save(trainer, self.last_model_path)

    def _save(self, trainer: Trainer, path: str) -> None:
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what `on_load_checkpoint` takes up, and the run's identity."""
        sizes = {}
        if trainer.is_global_zero:
            for path in self.run.growing:
                with suppress(FileNotFoundError), path.open("rb") as file:
                    os.fsync(file.fileno())
                    sizes[path.name] = file.seek(0, os.SEEK_END)
        stopped = trainer.should_stop and trainer.global_step != trainer.max_steps
        checkpoint["gptexp"] = {"config": self.fingerprint, "sizes": sizes, "row": self.record.row, "stopped": stopped}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Cut the files back, take up the row that is still to come, and stop where a callback had stopped the run.

        Raises:
            UserError: for a file that has lost rows.
        """
        if trainer.state.fn != "fit":
            return
        saved = checkpoint["gptexp"]
        trainer.should_stop = saved.get("stopped", False)
        if trainer.is_global_zero:
            for path in self.run.growing:
                cut(path, saved["sizes"].get(path.name, 0))
            self.record.row = saved.get("row", {})
