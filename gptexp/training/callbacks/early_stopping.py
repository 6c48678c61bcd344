"""Lightning's early stopping, for runs that can be killed at any moment."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping


class EarlyStopping(LightningEarlyStopping):
    """Stops once the monitored metric has not improved for `patience` evaluations; takes Lightning's arguments.

    A run that was killed after it had stopped, before its results were written, trains no further when it is resumed.
    """

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` evaluations brought no improvement."""
        return bool(self.wait_count >= self.patience)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop again where the checkpoint had stopped."""
        if self.exhausted:
            trainer.should_stop = True
