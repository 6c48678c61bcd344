"""A progress bar in a terminal; plain lines elsewhere."""

import logging
import time
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gptexp.config import Config
from gptexp.training.callbacks.recorder import Recorder
from gptexp.training.lean import LeanCallback
from gptexp.training.module import GPTModule

log = logging.getLogger("gptexp")


class ProgressReport(LeanCallback):
    """Shows step, loss, val loss, tokens a second and the time left; each evaluation leaves a line.

    Args:
        name: the run's name.
        config: the run's configuration.
        recorder: whose rows are shown.
        console: where to; a bar is drawn if it is a terminal.
    """

    def __init__(self, name: str, config: Config, recorder: Recorder, console: Console) -> None:
        self.name, self.max_steps, self.recorder, self.console = name, config.max_steps, recorder, console
        self.loss = "loss that sees later tokens" if recorder.run.sees_later_tokens else "loss"
        self._bar: Progress | None = None
        self._values: dict[str, Any] = {"loss": "-", "val": "-", "rate": "-"}
        self._written, self._start, self._first, self._line_at = -1, 0.0, 0, 0.0

    def on_train_start(self, trainer: Trainer, module: GPTModule) -> None:  # type: ignore[override]
        """Draw the bar."""
        self._start, self._first = time.perf_counter(), trainer.global_step
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
                TextColumn(self.loss + " {task.fields[loss]} · val {task.fields[val]} · {task.fields[rate]} tok/s ·"),
                TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._bar.start()
            self._bar.add_task(self.name, total=self.max_steps, completed=self._first, **self._values)

    def on_train_epoch_start(self, trainer: Trainer, module: GPTModule) -> None:  # type: ignore[override]
        """Report the evaluation of the untrained model."""
        if trainer.global_step == 0:
            self._report(trainer, 0)
            self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: GPTModule, *_: Any) -> None:  # type: ignore[override]
        """Move the bar; report a new row."""
        step = trainer.global_step
        if self.recorder.row and self.recorder.row["step"] != self._written:
            self._report(trainer, int(self.recorder.row["step"]))
        if self._bar and not self._bar.finished:
            self._bar.update(self._bar.task_ids[0], completed=step, **self._values)

    def _report(self, trainer: Trainer, step: int) -> None:
        row, self._written = self.recorder.row, step
        loss = row.get("val/loss", row.get("val/loss_windows"))
        if "train/loss" in row:
            self._values["loss"] = f"{row['train/loss']:.4f}"
            self._values["rate"] = f"{row['tokens_per_second']:,.0f}"
        if loss is not None:
            self._values["val"] = f"{loss:.4f}"
        now = time.perf_counter()
        # Plain lines come at evaluations and, in between, no more often than every ten seconds.
        if not trainer.is_global_zero or (loss is None and (self._bar or now - self._line_at < 10)):
            return
        self._line_at = now
        parts = [f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}"]
        parts += [f"{self.loss} {row['train/loss']:.4f}"] if "train/loss" in row else []
        parts += [f"val loss {loss:.4f}"] if loss is not None else []
        parts += [f"{self._values['rate']} tok/s"] if "train/loss" in row else []
        if step > self._first and step < self.max_steps:
            left = (now - self._start) / (step - self._first) * (self.max_steps - step)
            parts.append(f"{left // 60:.0f}:{left % 60:02.0f} left")
        log.info(" · ".join(parts))

    def on_train_end(self, trainer: Trainer, module: GPTModule) -> None:  # type: ignore[override]
        """Take the bar down."""
        self._close()

    def on_exception(self, trainer: Trainer, module: GPTModule, error: BaseException) -> None:  # type: ignore[override]
        """Take the bar down after an error, too."""
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
