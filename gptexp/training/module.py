"""The LightningModule: a model, its loss, its optimizer and its learning rate."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gptexp.config.schema import read_section
from gptexp.config.sections import ModelConfig, OptimizerConfig, ScheduleConfig
from gptexp.data.batches import Batch, draw
from gptexp.models.batch_norms import Penalized
from gptexp.models.counts import Counts
from gptexp.models.language_model import LanguageModel
from gptexp.models.settings import build_model
from gptexp.tasks.metrics import ExactMatch, LanguageModelMetrics, summed_loss
from gptexp.training.callbacks.evaluations import evaluation_due
from gptexp.training.optimizers import Parameters

UNKNOWN = 10**9  # steps: so many that a schedule stays at its peak
DROPOUT_STREAM = 16  # and on: the numbers before it belong to the data


class GPTModule(LightningModule):
    """Trains a language model with any Trainer; `GPTModule.load_from_checkpoint(path)` gives it back.

    Every `log_every_n_steps`, before an evaluation and at the last step, it logs `train/loss` (nats per token, the
    mean over the optimizer step), `grad_norm` (before clipping) and `learning_rate`; to do so at every step would cost
    a tenth of a small model's time. In validation it logs `val/loss`, `val/perplexity`, `val/accuracy` and `val/bpc`,
    or `val/loss_windows` alone if a batch says that it is not of the whole split. Each time it logs `step`, too, the
    number of optimizer steps done, which Lightning passes on to loggers.

    Args:
        model: settings of the model: a mapping such as `{"norm": "rmsnorm", "n_layer": 2, "vocab_size": 65}`, or one of
            `ModelConfig`.
        optimizer: settings of the optimizer, in the same way, such as `{"name": "adamw", "learning_rate": 1e-3}`.
        schedule: settings of the learning rate, in the same way, such as `{"name": "cosine", "warmup_steps": 100}`.
        seed: of the initial weights and of dropout.
        chars_per_token: of the validation split, for bits per character.
        exact_match: also log `val/exact_match`, the share of rows whose every target is the likeliest token.

    Attributes:
        model: the network, called as model(ids, mask).
        step_loss: of the last optimizer step, without penalties.
        grad_norm: of the last optimizer step, before clipping.
        rate: the learning rate of that step.
        planned_steps: optimizer steps of the whole training, as the schedule needs them; an estimate, which a callback
            may correct, where training ends with the time.

    Raises:
        UserError: with one line for every mistake in the settings.
    """

    def __init__(
        self,
        model: ModelConfig | Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | Mapping[str, Any] | None = None,
        schedule: ScheduleConfig | Mapping[str, Any] | None = None,
        *,
        seed: int = 1337,
        chars_per_token: float = 1.0,
        exact_match: bool = False,
    ) -> None:
        super().__init__()
        network: ModelConfig = read_section("model", model)
        self.optimizer_config: OptimizerConfig = read_section("optimizer", optimizer)
        self.schedule_config: ScheduleConfig = read_section("schedule", schedule)
        sections = {"model": network, "optimizer": self.optimizer_config, "schedule": self.schedule_config}
        plain = {name: asdict(section) for name, section in sections.items()}
        others = {"seed": seed, "chars_per_token": chars_per_token, "exact_match": exact_match}
        self.save_hyperparameters(plain | others, logger=False)
        self.seed = seed
        self.learning_rate = self.optimizer_config.learning_rate  # the peak; `lr_find` changes it
        self.model: LanguageModel = build_model(network, seed)
        self.val_metrics = LanguageModelMetrics(chars_per_token)
        self.exact_match = ExactMatch() if exact_match else None
        self.penalized: list[Any] = [m for m in self.model.modules() if isinstance(m, Penalized)]
        self.matrices = {n for n, p in self.named_parameters() if p.ndim >= 2}  # a sharded one hides its shape
        self.weights = list(self.parameters())
        self.step_loss, self.grad_norm, self.rate = torch.zeros(()), torch.zeros(()), 0.0
        self.planned_steps = UNKNOWN

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (N, L, V) of ids (N, L)."""
        logits: Tensor = self.model(ids, mask)
        return logits

    def setup(self, stage: str) -> None:
        """Sum up losses in float32 where the device has no float64."""
        if self.trainer.strategy.root_device.type == "mps":
            self.val_metrics = LanguageModelMetrics(self.val_metrics.chars_per_token, wide=False)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout's random numbers a function of the seed and the step alone."""
        stream = DROPOUT_STREAM + (self.global_rank << 32) + batch_idx % self.trainer.accumulate_grad_batches
        _seed_dropout(int(draw(self.seed, self.global_step, 1, 2**62, stream)[0]), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The micro-batch's loss: nats per token, weighted so that the mean over micro-batches and ranks is exact.

        What is returned to be minimized includes the penalties of regularized norms; the logged loss does not. A model
        that counts does so here, over the whole training split, and minimizes nothing.
        """
        if isinstance(self.model, Counts):
            self.model.learn(self.trainer.datamodule.all_training_rows())
            return None
        loss = summed_loss(self(batch.x, batch.mask), batch.y) / batch.tokens
        micro_batches = self.trainer.accumulate_grad_batches
        place, share = batch_idx % micro_batches, loss.detach() / micro_batches
        self.step_loss = share if place == 0 else self.step_loss + share
        return loss + sum(norm.penalty for norm in self.penalized) if self.penalized else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Set the weight decay of the step, if it changes."""
        if self.schedule_config.weight_decay_ratio == 1:
            return
        share = self.schedule_config.weight_decay(self.global_step, self.planned_steps)
        for group in optimizer.param_groups:
            group["weight_decay"] = group.setdefault("initial_weight_decay", group["weight_decay"]) * share

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradient's norm, then clip as the Trainer's arguments say."""
        if not self.weights:  # of a model that counts
            return
        sharded: Any = self.trainer.strategy.model
        if hasattr(sharded, "clip_grad_norm_"):  # a process knows only its share of a sharded model's norm
            self.grad_norm = sharded.clip_grad_norm_(gradient_clip_val or math.inf)
        else:
            self.grad_norm = nn.utils.get_total_norm([p.grad for p in self.weights if p.grad is not None])
            if gradient_clip_val and gradient_clip_algorithm == "value":
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            elif gradient_clip_val:
                nn.utils.clip_grads_with_norm_(self.weights, gradient_clip_val, self.grad_norm)
        self.rate = float(optimizer.param_groups[0]["lr"])
        trainer, step = self.trainer, self.global_step + 1
        if step % trainer.log_every_n_steps == 0 or step == trainer.max_steps or evaluation_due(trainer, step):
            self.log_step(step)

    def log_step(self, step: int) -> None:
        """Log the training metrics of an optimizer step, counted from 1 on."""
        self.log("train/loss", self.step_loss, prog_bar=True, sync_dist=self.trainer.world_size > 1)
        self.log_dict({"grad_norm": self.grad_norm, "learning_rate": self.exact(self.rate), "step": float(step)})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a batch's losses and hits; padding enters none of them."""
        logits = self(batch.x)
        self.val_metrics.update(logits, batch.y)
        if self.exact_match is not None:
            self.exact_match.update(logits, batch.y)
        self._whole = batch.whole

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all batches and all ranks."""
        values = self.val_metrics.compute()
        self.val_metrics.reset()
        if self.exact_match is not None:
            values["exact_match"] = self.exact_match.compute()
            self.exact_match.reset()
        shown = {f"val/{k}": v for k, v in values.items()} if self._whole else {"val/loss_windows": values["loss"]}
        self.log_dict({name: self.exact(value) for name, value in shown.items()})
        self.log("step", float(self.global_step))

    def exact(self, value: float) -> Tensor:
        """A number in float64, where the device has it: Lightning makes float32 of plain ones."""
        return torch.tensor(value, dtype=torch.float32 if self.device.type == "mps" else torch.float64)

    def configure_optimizers(self) -> dict[str, Any] | None:
        """The configured optimizer, and a scheduler that moves its learning rates at every step."""
        if not self.weights:
            return None
        fused = self.trainer.precision != "16-mixed"  # a fused step would skip the unscaling that clipping needs
        hidden = {f"model.{name}": parts for name, parts in self.model.hidden_matrices.items()}
        parameters = Parameters(list(self.named_parameters()), self.matrices, hidden)
        optimizer = self.optimizer_config.build(parameters, self.learning_rate, fused)
        steps = self.trainer.max_steps if self.trainer.max_steps > 0 else self.trainer.estimated_stepping_batches
        self.planned_steps = int(steps) if math.isfinite(steps) else UNKNOWN
        scheduler = LambdaLR(optimizer, lambda step: self.schedule_config.factor(step, self.planned_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _seed_dropout(seed: int, device: torch.device) -> None:
    # torch.manual_seed would also queue a call, with a stack trace, for every kind of device that is not there.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
