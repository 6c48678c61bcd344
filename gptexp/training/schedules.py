"""Learning-rate schedules: functions of the step, without state."""

import math
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from gptexp.config.sections import ScheduleConfig
from gptexp.config.settings import settings
from gptexp.registry import SCHEDULES

Fraction = Annotated[float, Ge(0), Le(1)]


@settings
class _Decaying(ScheduleConfig):
    decay_steps: Annotated[int, Ge(1)] | None = None
    """The step at which the decay ends; null is `max_steps`."""
    min_lr_ratio: Fraction = 0.1
    """The learning rate where the decay ends, as a fraction of the peak."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        end = self.decay_steps or max_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, end - self.warmup_steps))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * self.left(done)

    def left(self, done: float) -> float:
        """What is left of the decay once this fraction of its steps is done."""
        raise NotImplementedError


@SCHEDULES.register("cosine")
@settings
class Cosine(_Decaying):
    """Falls in half a cosine: Loshchilov, Hutter 2017, "SGDR", without its restarts."""

    name: Literal["cosine"] = "cosine"

    def left(self, done: float) -> float:
        """Half a cosine."""
        return 0.5 * (1 + math.cos(math.pi * done))


@SCHEDULES.register("linear")
@settings
class Linear(_Decaying):
    """Falls in a line."""

    name: Literal["linear"] = "linear"

    def left(self, done: float) -> float:
        """A line."""
        return 1 - done


@SCHEDULES.register("constant")
@settings
class Constant(ScheduleConfig):
    """The learning rate stays at its peak."""

    name: Literal["constant"] = "constant"
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps in which the learning rate climbs in a straight line to its peak."""


@SCHEDULES.register("step")
@settings
class Step(ScheduleConfig):
    """Falls once, at a share of `max_steps`."""

    name: Literal["step"] = "step"
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps in which the learning rate climbs in a straight line to its peak."""
    at: Annotated[float, Gt(0), Lt(1)] = 0.5
    """The share of `max_steps` after which it falls."""
    ratio: Fraction = 0.1
    """What it falls to, as a fraction of the peak."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        """The peak, and then a fraction of it."""
        return 1.0 if step < self.at * max_steps else self.ratio


@SCHEDULES.register("wsd")
@settings
class WSD(ScheduleConfig):
    """Warm-up, stable, decay: falls in a line over the last `decay_fraction` of `max_steps` (Hu et al. 2024)."""

    name: Literal["wsd"] = "wsd"
    decay_fraction: Annotated[float, Gt(0), Le(1)] = 0.2
    """The share of `max_steps` over which the learning rate falls."""
    min_lr_ratio: Fraction = 0.0
    """The learning rate where it ends, as a fraction of the peak."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        """The peak, and then a line."""
        decay = max(1, round(max_steps * self.decay_fraction))
        left = max(0.0, min(1.0, (max_steps - step) / decay))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * left
