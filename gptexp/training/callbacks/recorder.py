"""Measures a run: training metrics, evaluations and samples, to metrics.csv and to the loggers."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from gptexp.config import Config
from gptexp.data.datamodule import Batch
from gptexp.records import Metrics, append_sample
from gptexp.runs import Run
from gptexp.training.lean import LeanCallback
from gptexp.training.module import GPTModule, TrainState

LATER = ("cuda",)
"""Devices whose numbers are looked at a log row later. By then they have arrived; to wait for them would leave the
device without work."""

Watch = Callable[[int, float], bool]
"""Is given the step and the loss of an evaluation; returns whether the run is to be pruned."""


class Recorder(LeanCallback):
    """Writes a row of metrics at each `log_interval`, evaluation and at the end.

    Evaluates at the start, every `eval_interval` steps and at the end, and stops the run when the loss or its
    gradient is no longer finite, or when `early_stop_patience` evaluations brought no improvement.

    Args:
        run: where metrics.csv and samples.txt are.
        config: the run's configuration.
        val_batches: the validation batches, of the whole split if called with True.
        sample: a text from the model as it is now; None samples none.
        show_sample: takes the step and the text, on the first rank.
        flops_per_token: floating-point operations of a training step for each token.
        peak_flops: measures the floating-point operations a second that the devices can reach together.
        watch: is given the step and loss of each evaluation, and prunes the run by returning True.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        *,
        val_batches: Callable[[bool], Iterable[Batch]],
        sample: Callable[[GPTModule], str] | None,
        show_sample: Callable[[int, str], None],
        flops_per_token: float,
        peak_flops: Callable[[], float],
        watch: Watch | None = None,
    ) -> None:
        self.run, self.config, self.val_batches = run, config, val_batches
        self.sample, self.show_sample = sample, show_sample
        self.flops_per_token, self.peak_flops, self.watch = flops_per_token, peak_flops, watch
        self.peak = math.inf
        self.row: dict[str, float] = {}
        self.text: str | None = None
        self._pending: tuple[dict[str, float], Callable[[], list[float]]] | None = None
        self._step = -1
        self._metrics: Metrics | None = None

    def on_train_start(self, trainer: Trainer, module: GPTModule) -> None:  # type: ignore[override]
        """Open the files where the checkpoint left them."""
        self._step = trainer.global_step
        fresh = self._step == 0
        if fresh:  # also one that was stopped before its second checkpoint: what comes now came before that, too
            module.state = TrainState()
        state = module.state
        if state.status in ("stopped_early", "pruned"):  # killed after its last step, before its results were written
            trainer.should_stop = True
        if trainer.is_global_zero:
            self._metrics = Metrics(self.run.metrics_path, None if fresh else state.metrics_size)
            with self.run.samples_path.open("ab") as samples:
                samples.truncate(0 if fresh else state.samples_size)
        self._logged = state.tokens, state.seconds
        if not fresh:
            self.peak = self.peak_flops()
        self.restart_clock()

    def on_train_epoch_start(self, trainer: Trainer, module: GPTModule) -> None:  # type: ignore[override]
        """Evaluate a new model; every callback has started by now, so signals are already looked after."""
        if trainer.global_step == 0:
            self._evaluate(trainer, module, step=0)
            self._write(trainer, module, {"step": 0, "tokens": 0})
            self.peak = self.peak_flops()  # only now, when W&B's process no longer starts on the same cores
            self.restart_clock()

    def on_train_batch_end(self, trainer: Trainer, module: GPTModule, _: Any, batch: Batch, i: int) -> None:  # type: ignore[override]
        """After each optimizer step: record what is due."""
        state, step, c = module.state, trainer.global_step, self.config
        share = trainer.world_size * c.gradient_accumulation_steps
        if step == self._step:  # between the micro-batches of a step
            return
        self._step, self.row, self.text = step, {}, None
        state.tokens += round(batch.tokens * share)
        last = step == c.max_steps
        evaluate = last or step % c.eval_interval == 0
        log = evaluate or step % c.log_interval == 0
        save = evaluate or step % (c.checkpoint_interval or c.eval_interval) == 0
        later = module.device.type in LATER and not save
        if log or save:
            self.flush(trainer, module)
        # Off the CPU a look at a number waits for the device, so there the check comes with rows and checkpoints.
        check = (log or save or module.device.type == "cpu") and not later
        if state.status == "diverged" or (check and _diverged(trainer, float(module.grad_norm))):
            state.status, log, evaluate, later = "diverged", True, False, False
            trainer.should_stop = True
        if not log:
            self._tick(module)
            return
        numbers = trainer.strategy.reduce(module.step_loss, reduce_op="mean"), module.grad_norm
        if later:
            self._pending = self._train_row(module, step), _on_the_way(numbers)
            return
        loss, grad_norm = (float(n) for n in numbers)
        self.row, row = {}, self._complete(trainer, module, self._train_row(module, step), loss, grad_norm)
        if evaluate:
            self._evaluate(trainer, module, step)
        self._write(trainer, module, row)
        if evaluate:
            self.restart_clock()

    def flush(self, trainer: Trainer, module: GPTModule) -> None:
        """Write the row whose numbers were still to arrive, if there is one."""
        if self._pending:
            (row, numbers), self._pending = self._pending, None
            self._write(trainer, module, self._complete(trainer, module, row, *numbers()))

    def restart_clock(self) -> None:
        """Leave out the time since the last step: it went into evaluating or saving."""
        self._mark = time.perf_counter()

    def on_train_end(self, trainer: Trainer, module: GPTModule) -> None:  # type: ignore[override]
        """Close the file."""
        self.flush(trainer, module)
        if self._metrics:
            self._metrics.close()

    def on_exception(self, trainer: Trainer, module: GPTModule, exception: BaseException) -> None:  # type: ignore[override]
        """Close the file."""
        if self._metrics:
            self._metrics.close()

    def _tick(self, module: GPTModule) -> None:
        now = time.perf_counter()
        module.state.seconds += now - self._mark
        self._mark = now

    def _complete(
        self, trainer: Trainer, module: GPTModule, row: dict[str, float], loss: float, grad_norm: float
    ) -> dict[str, float]:
        if not math.isfinite(loss) or _diverged(trainer, grad_norm):
            module.state.status = "diverged"
            trainer.should_stop = True
        return row | {"train/loss": loss, "grad_norm": grad_norm}

    def _train_row(self, module: GPTModule, step: int) -> dict[str, float]:
        state = module.state
        self._tick(module)
        tokens, seconds = state.tokens - self._logged[0], state.seconds - self._logged[1]
        self._logged = state.tokens, state.seconds
        rate = tokens / max(seconds, 1e-9)
        return {
            "step": step,
            "tokens": state.tokens,
            "learning_rate": module.learning_rate,
            "seconds": state.seconds,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak,
        }

    def _evaluate(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        start, state, c = time.perf_counter(), module.state, self.config
        if state.status == "diverged":
            return
        values = module.evaluate(self.val_batches(c.eval_windows is None))
        self._judge(trainer, module, values["loss"], step)
        if c.eval_windows is not None:
            self.row["val/loss_windows"] = values["loss"]
            last = step == c.max_steps or state.status in ("stopped_early", "pruned")
            values = module.evaluate(self.val_batches(True)) if last else {}
        self.row |= {f"val/{k}": v for k, v in values.items()}
        if self.sample and state.status != "diverged":
            self.text = self.sample(module)
        state.eval_seconds += time.perf_counter() - start

    def _judge(self, trainer: Trainer, module: GPTModule, loss: float, step: int) -> None:
        state, patience = module.state, self.config.early_stop_patience
        if not math.isfinite(loss):
            state.status = "diverged"
        elif loss < state.best_loss:
            state.best_loss, state.best_step, state.since_best = loss, step, 0
        else:
            state.since_best += 1
            if patience is not None and state.since_best >= patience and step < self.config.max_steps:
                state.status = "stopped_early"
        if state.status == "running" and self.watch and step < self.config.max_steps and self.watch(step, loss):
            state.status = "pruned"
        if state.status != "running":
            trainer.should_stop = True

    def _write(self, trainer: Trainer, module: GPTModule, row: dict[str, float]) -> None:
        self.row = row | self.row
        if not trainer.is_global_zero:
            return
        assert self._metrics is not None
        self._metrics.append(self.row)
        module.state.metrics_size = self._metrics.size()
        if self.text is not None:
            step = int(row["step"])
            module.state.samples_size = append_sample(self.run.samples_path, step, self.text)
            self.show_sample(step, self.text)
        for logger in trainer.loggers:
            logger.log_metrics(self.row, step=int(row["step"]))


def _diverged(trainer: Trainer, grad_norm: float) -> bool:
    # Every rank sees the same gradient norm, so all stop together. A loss scaler meets infinite gradients in the normal
    # course of things.
    return trainer.precision != "16-mixed" and not math.isfinite(grad_norm)


def _on_the_way(numbers: tuple[Tensor, ...]) -> Callable[[], list[float]]:
    """Have numbers of a GPU sent here; what is returned waits for them, if need be, and gives them."""
    sent = torch.stack([n.double() for n in numbers])
    here = torch.empty(sent.shape, dtype=sent.dtype, pin_memory=True).copy_(sent, non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def given() -> list[float]:
        arrived.synchronize()
        values: list[float] = here.tolist()
        return values

    return given
