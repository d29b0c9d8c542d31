"""Learning rates as pure functions of the epoch or the step, and SimCLR's optimizer."""

import math

import torch


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


def warmup_cosine_rate(base_lr, step, warmup, total):
    """The learning rate of `step` (0-based) of `total`: linear from 0 over `warmup` steps, then half a cosine to 0.

    Source: arXiv:2002.05709 section 2.2, as SimCLR's code has it.
    """
    if step < warmup:
        return base_lr * step / warmup
    return base_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def rate_at(base_lr, step, steps_per_epoch, epochs, schedule, warmup_epochs=0):
    """The learning rate of `step` (0-based) under a schedule of the papers, which are given in epochs.

    schedule: "cosine" and "step" (divided by ten at 60 % and 80 % of the epochs) change once an epoch, as in MoCo's
    code; "warmup-cosine" changes at every step, as in SimCLR's. Raises ValueError for another schedule.
    """
    if schedule == "warmup-cosine":
        return warmup_cosine_rate(base_lr, step, warmup_epochs * steps_per_epoch, epochs * steps_per_epoch)
    return learning_rate(base_lr, step // steps_per_epoch, epochs, schedule, (0.6 * epochs, 0.8 * epochs))


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose update of each weight is scaled by trust * |weight| / |gradient|.

    The gradient includes weight decay, and the learning rate is inside the momentum. Biases and BatchNorm (tensors of
    one dimension) are neither decayed nor scaled. If one of the norms is 0, the scale is 1.
    Source: arXiv:1708.03888, as in SimCLR's code; other implementations differ in each of these points.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            scaled = [parameter for parameter in parameters if parameter.dim() > 1]
            plain = [parameter for parameter in parameters if parameter.dim() <= 1]
            updates = [parameter.grad for parameter in plain]
            if scaled:
                gradients = torch._foreach_add([p.grad for p in scaled], scaled, alpha=group["weight_decay"])
                weight, gradient = (torch.stack(torch._foreach_norm(tensors)) for tensors in (scaled, gradients))
                ratio = torch.where((weight > 0) & (gradient > 0), group["trust"] * weight / gradient, 1)
                updates += torch._foreach_mul(gradients, list(ratio))
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in plain + scaled]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates, alpha=group["lr"])
            torch._foreach_sub_(plain + scaled, buffers)
