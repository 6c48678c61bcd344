"""A progress bar in a terminal; plain lines elsewhere."""

import logging
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gptexp.runs.files import EXACT_MATCH
from gptexp.training.module import UNKNOWN

log = logging.getLogger("gptexp")


class ProgressReport(ProgressBar):
    """Shows step, loss, val loss, tokens per second and the time left; each evaluation leaves a line.

    A bar is drawn if the console is a terminal. The validation loss is the metric `monitor`; `loss` is what the
    training loss is called.
    """

    def __init__(self, name: str, monitor: str, loss: str, console: Console) -> None:
        super().__init__()
        self.name, self.monitor, self.loss, self.console = name, monitor, loss, console
        self._bar: Progress | None = None
        self._enabled = True
        self._start, self._first, self._line_at = 0.0, 0, 0.0

    def disable(self) -> None:
        """Show nothing; Lightning disables it on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show it."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar."""
        self._start, self._first = time.perf_counter(), trainer.global_step
        if self._enabled and self.console.is_terminal:
            text = self.loss + " {task.fields[loss]} · val {task.fields[val]} · {task.fields[rate]} tok/s ·"
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn(text),
                TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._bar.start()
            total = planned_steps(pl_module)
            self._bar.add_task(self.name, total=total, completed=self._first, loss="-", val="-", rate="-")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the bar; without one, leave a line every ten seconds."""
        step = trainer.global_step
        if not self._enabled or (step % trainer.log_every_n_steps and not self._bar):
            return
        if self._bar:
            shown = self._shown(trainer) if step % trainer.log_every_n_steps == 0 else {}
            self._bar.update(self._bar.task_ids[0], completed=step, total=planned_steps(pl_module), **shown)
        elif time.perf_counter() - self._line_at > 10:
            self._line(trainer, planned_steps(pl_module), evaluated=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a line."""
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._line(trainer, planned_steps(pl_module), evaluated=True)
            if trainer.global_step == self._first:  # the time that an evaluation takes at the start says nothing
                self._start = time.perf_counter()
            if self._bar:
                self._bar.update(self._bar.task_ids[0], **self._shown(trainer))

    def _shown(self, trainer: Trainer) -> dict[str, Any]:
        metrics = trainer.callback_metrics
        forms = {"loss": ("train/loss", ".4f"), "val": (self.monitor, ".4f"), "rate": ("tokens_per_second", ",.0f"),
                 "right": (EXACT_MATCH, ".1%")}  # fmt: skip
        return {key: format(float(metrics[name]), form) if name in metrics else "-"
                for key, (name, form) in forms.items()}  # fmt: skip

    def _line(self, trainer: Trainer, steps: int | None, evaluated: bool) -> None:
        step, now, shown = trainer.global_step, time.perf_counter(), self._shown(trainer)
        self._line_at = now
        parts = [f"step {step:>{len(str(steps))}}/{steps}" if steps else f"step {step}"]
        parts += [f"{self.loss} {shown['loss']}"] if shown["loss"] != "-" else []
        whole = "" if self.monitor == "val/loss" else " (some windows)"
        parts += [f"val loss {shown['val']}{whole}"] if evaluated else []
        parts += [f"{shown['right']} right"] if evaluated and shown["right"] != "-" else []
        parts += [f"{shown['rate']} tok/s"] if shown["rate"] != "-" else []
        if steps and self._first < step < steps:
            left = (now - self._start) / (step - self._first) * (steps - step)
            parts.append(f"{left // 60:.0f}:{left % 60:02.0f} left")
        log.info(" · ".join(parts))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar down."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bar down after an error, too."""
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def planned_steps(module: LightningModule) -> int | None:
    """The optimizer steps of the whole training; None where they are not known."""
    steps = int(getattr(module, "planned_steps", UNKNOWN))
    return steps if steps < UNKNOWN else None
