"""When the validation split is evaluated."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer


class Evaluations(Callback):
    """Evaluates before the first step and after the last one, besides Lightning's every `val_check_interval`."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the untrained model, once all callbacks have started."""
        if trainer.global_step == 0 and trainer.enable_validation and not trainer.fast_dev_run:
            trainer.validating = True  # as Lightning's own loop does around an evaluation
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Stop after the last step: Lightning evaluates before it stops, whether or not an evaluation is due."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True


def evaluation_due(trainer: Trainer, step: int | None = None) -> bool:
    """Whether the Trainer evaluates after an optimizer step, counted from 1 on; None is the last one done."""
    interval, step = trainer.val_check_batch, trainer.global_step if step is None else step
    if not trainer.enable_validation or interval is None or math.isinf(interval):
        return False
    return bool(trainer.should_stop) or step * trainer.accumulate_grad_batches % interval == 0
