"""Learning-rate schedules: plain functions of the step, without state."""

import math

from gptexp.training.settings import CosineConfig, LinearConfig, ScheduleConfig, WSDConfig


def lr_factor(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """The learning rate of a step, from 0 on, as a fraction of the peak.

    Warmup climbs in a straight line and reaches the peak at step `warmup_steps`: (step + 1) / (warmup_steps + 1).
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    match config:
        case CosineConfig() | LinearConfig():
            end = config.decay_steps or max_steps
            done = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
            left = 0.5 * (1 + math.cos(math.pi * done)) if isinstance(config, CosineConfig) else 1 - done
        case WSDConfig():
            decay = max(1, round(max_steps * config.decay_fraction))
            left = min(1.0, (max_steps - step) / decay)
        case _:
            return 1.0
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * max(0.0, left)
