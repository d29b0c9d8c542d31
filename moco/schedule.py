"""Learning rates as pure functions of the epoch."""

import math


def learning_rate(base_lr, epoch, epochs, schedule, milestones):
    """The learning rate of `epoch` (0-based), constant within it.

    schedule: "cosine", half a period over `epochs`, or "step", divided by ten at each of `milestones` (epochs).
    Raises ValueError for another schedule.
    Source: arXiv:2003.04297 section 3 (cosine), arXiv:1911.05722 section 4.1 (step).
    """
    if schedule == "cosine":
        return base_lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule == "step":
        return base_lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)
    raise ValueError(f"schedule must be cosine or step, got {schedule!r}")


def warmup_step_rate(base_lr, iteration, milestones, warmup):
    """The learning rate of `iteration` (0-based): linear from base_lr / 1000 over `warmup`, / 10 at each milestone.

    Source: detectron2's WarmupMultiStepLR, as the reference fine-tunes detectors.
    """
    ramp = 1.0 if iteration >= warmup else 0.001 + 0.999 * iteration / warmup
    return base_lr * ramp * 0.1 ** sum(iteration >= milestone for milestone in milestones)
