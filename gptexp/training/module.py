"""The LightningModule: a model, its loss, its optimizer, and all that a checkpoint must hold."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from gptexp.config import Config
from gptexp.data.batches import draw
from gptexp.data.datamodule import Batch
from gptexp.models.language_model import LanguageModel
from gptexp.training.metrics import LanguageModelMetrics, summed_loss
from gptexp.training.optimizers import build_optimizer
from gptexp.training.schedules import learning_rate

CLIP_MARGIN = 1e-6  # that torch adds to a norm before it divides by it
DROPOUT_STREAM = 16  # and on: the numbers before it belong to the data


@dataclass
class TrainState:
    """What a run has done so far; travels in the checkpoint.

    Attributes:
        status: "running", until something else stops the run.
        tokens: training targets seen, over all devices.
        seconds: of training, without evaluation and checkpoints.
        eval_seconds: of evaluation and sampling.
        best_loss: lowest validation loss of an evaluation, in nats a token.
        best_step: its step.
        since_best: evaluations since then.
        metrics_size: bytes of metrics.csv at the checkpoint.
        samples_size: bytes of samples.txt at the checkpoint.
        diagnostics_size: bytes of diagnostics.csv at the checkpoint.
    """

    status: str = "running"
    tokens: int = 0
    seconds: float = 0.0
    eval_seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    since_best: int = 0
    metrics_size: int = 0
    samples_size: int = 0
    diagnostics_size: int = 0


class GPTModule(LightningModule):
    """Trains a model that maps ids (N, L) to logits (N, L, V).

    Args:
        model: the network; called as model(ids, mask).
        config: the run's configuration.
        chars_per_token: of the validation split, for bits per character.
    """

    # No functions: Lightning then passes over these hooks of a step.
    on_before_zero_grad: Any = None
    on_before_backward: Any = None
    on_after_backward: Any = None
    on_before_optimizer_step: Any = None
    on_train_batch_end: Any = None

    def __init__(self, model: LanguageModel, config: Config, chars_per_token: float = 1.0) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.state = TrainState()
        self.chars_per_token = chars_per_token
        self.weights = list(model.parameters())  # to gather them anew would be some hundredths of a small step
        self.penalised: list[Any] = [m for m in model.modules() if hasattr(m, "penalty")]
        self.matrices = {n for n, p in self.named_parameters() if p.ndim >= 2}
        self.step_loss = torch.zeros(())  # the mean loss of the current step's micro-batches
        self.grad_norm = torch.zeros(())  # before clipping
        self.learning_rate = 0.0
        self._micro_batch = 0

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module's, but for the name of the current hook, which Lightning notes dozens of times a step."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (N, L, V) of ids (N, L)."""
        logits: Tensor = self.model(ids, mask)
        return logits

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout's random numbers, and the learning rate, are functions of the seed and the step alone."""
        first = self._micro_batch % self.config.gradient_accumulation_steps == 0
        self._micro_batch = 0 if first else self._micro_batch
        stream = DROPOUT_STREAM + (self.global_rank << 32) + self._micro_batch
        _seed_dropout(int(draw(self.config.seed, self.global_step, 1, 2**62, stream)[0]), self.device)
        if first:
            c = self.config
            self.learning_rate = learning_rate(c.schedule, c.optimizer.learning_rate, self.global_step, c.max_steps)
            for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
                group["lr"] = self.learning_rate * group.get("lr_scale", 1.0)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The batch on the device; on the CPU it is there, and Lightning need not look through it."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's loss: nats a token, weighted so that the mean over micro-batches and ranks is exact.

        What is returned to be minimised has the penalties of regularised norms in it; the reported loss has not.
        """
        loss = summed_loss(self.model(batch.x, batch.mask), batch.y) / batch.tokens
        share = loss.detach() / self.config.gradient_accumulation_steps
        self.step_loss = share if self._micro_batch == 0 else self.step_loss + share
        self._micro_batch += 1
        return loss + sum(norm.penalty for norm in self.penalised) if self.penalised else loss

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Measure the gradient's norm and scale it down to `grad_clip`."""
        limit = self.config.grad_clip or math.inf
        wrapped: Any = self.trainer.strategy.model
        if hasattr(wrapped, "clip_grad_norm_"):  # a process knows only its share of a sharded model's norm
            self.grad_norm = wrapped.clip_grad_norm_(limit)
            return
        self.grad_norm = nn.utils.get_total_norm([p.grad for p in self.weights if p.grad is not None])
        # Elsewhere a look at the norm would wait for the device, and to scale by 1 is cheaper than that.
        if limit < math.inf and (self.device.type != "cpu" or not limit / (self.grad_norm + CLIP_MARGIN) >= 1):
            nn.utils.clip_grads_with_norm_(self.weights, limit, self.grad_norm)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The configured optimizer; the learning rate is set at every step, so no scheduler is needed."""
        # A fused step under a loss scaler would skip the unscaling that clipping needs.
        fused = self.trainer.precision != "16-mixed"
        hidden = {f"model.{name}": parts for name, parts in self.model.hidden_matrices.items()}
        return build_optimizer(self.config.optimizer, self.named_parameters(), self.matrices, hidden, fused)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Every rank holds all weights in here, also of a model that is shared out among ranks."""
        wrapped = self.trainer.strategy.model
        if self.config.hardware.strategy == "fsdp":
            from torch.distributed.fsdp import FullyShardedDataParallel  # here, because it takes a second to import

            if isinstance(wrapped, FullyShardedDataParallel):  # a single device shares nothing out
                with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
                    yield
                return
        yield

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss, perplexity, accuracy and bpc over batches, in evaluation mode, summed over all ranks."""
        was_training = self.training
        metrics = LanguageModelMetrics(self.chars_per_token, wide=self.device.type != "mps").to(self.device)
        self.eval()
        with self.whole_weights():
            for batch in batches:
                on_device = self.trainer.strategy.batch_to_device(batch)
                with self.trainer.precision_plugin.forward_context():
                    metrics.update(self.model(on_device.x), on_device.y)
        self.train(was_training)
        return metrics.compute()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the run's progress and identity."""
        checkpoint["gptexp"] = {"state": asdict(self.state), "config": self.config.fingerprint()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the run's progress."""
        self.state = TrainState(**checkpoint["gptexp"]["state"])
        if self.state.status == "interrupted":
            self.state.status = "running"


def _seed_dropout(seed: int, device: torch.device) -> None:
    # torch.manual_seed would also queue a call, with a stack trace, for every kind of device that is not there.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
