"""What changes with the step, as pure functions of it: the learning rate (warm-up, then cosine, steps, one cycle or
constant), and the decay of averaged weights.
"""

import math

from stas_core.train.recipe import ScheduleConfig

_ONE_CYCLE_RISE = 0.3
_ONE_CYCLE_START = 0.04
_EMA_WARM_UP_POWER = 2 / 3


def lr_factor(config: ScheduleConfig, *, step: int, steps_per_epoch: int, num_epochs: int) -> float:
    """Return the factor of the peak learning rate for one optimiser step.

    Args:
        config: the course.
        step: optimiser steps made before this one, over all epochs.
        steps_per_epoch: optimiser steps in an epoch.
        num_epochs: length of the run.
    """
    num_steps = num_epochs * steps_per_epoch
    if config.kind == "one_cycle":
        return _one_cycle(step, num_steps, config.final_factor)
    num_warmup = int(min(config.warmup_epochs, num_epochs / 2) * steps_per_epoch)
    if step < num_warmup:
        return step / num_warmup
    if config.kind == "cosine":
        return _half_cosine(1.0, config.final_factor, (step - num_warmup) / max(1, num_steps - num_warmup))
    if config.kind == "step":
        num_reductions = (step - num_warmup) // (config.step_epochs * steps_per_epoch)
        return float(max(config.final_factor, config.step_factor**num_reductions))
    return 1.0


def ema_decay(most: float, num_updates: int) -> float:
    """Return the decay of the weights' moving average after `num_updates` updates, warmed up as timm's ModelEmaV3 does.

    A fixed decay of 0.99 would still be mostly the untrained weights after a hundred steps.

    Example:
        >>> [round(ema_decay(0.99, step), 2) for step in (0, 1, 10, 100, 1000)]
        [0.0, 0.37, 0.8, 0.95, 0.99]
    """
    return min(most, 1.0 - float((1 + num_updates) ** -_EMA_WARM_UP_POWER))


def _one_cycle(step: int, num_steps: int, final: float) -> float:
    peak = max(0.0, _ONE_CYCLE_RISE * num_steps - 1)
    if step < peak:
        return _half_cosine(_ONE_CYCLE_START, 1.0, step / peak)
    return _half_cosine(1.0, final, (step - peak) / max(1, num_steps - 1 - peak))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2
