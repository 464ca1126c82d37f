"""One optimizer step: AdamW, its learning-rate schedule, gradient clipping, and the split into forward passes."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

from keel.data.padding import microbatches
from keel.learn.masters import MasterAdamW, needs_master, with_master
from keel.shards import full_tensor

__all__ = [
    "build_optimizer",
    "clip_gradients",
    "gradient_norm",
    "learning_rate_factor",
    "microbatches",
    "set_learning_rate",
    "warmup_warning",
]


def build_optimizer(
    groups: Sequence[tuple[Iterable[Parameter], float]], weight_decay: float = 0.0, eps: float = 1e-8
) -> AdamW:
    """Build AdamW in torch's form, with eps added to the bias-corrected root.

    Weights of 16 bits are trained through float32 masters (`keel.learn.masters`).
    Matrices decay; norms, biases and other vectors do not. Frozen parameters are left out. A parameter in several
    groups (tied weights, a shared trunk) is updated once, in the first group that holds it.

    Args:
        groups: pairs of parameters and learning rate.
    """
    seen: set[int] = set()
    settings = []
    masters: dict[Parameter, Parameter] = {}
    for group, (parameters, learning_rate) in enumerate(groups):
        fresh = [p for p in dict.fromkeys(parameters) if p.requires_grad and id(p) not in seen]
        seen.update(map(id, fresh))
        masters |= {p: with_master(p) for p in fresh if needs_master(p)}
        fresh = [masters.get(p, p) for p in fresh]
        for subset, decay in (
            ([p for p in fresh if p.dim() > 1], weight_decay),
            ([p for p in fresh if p.dim() <= 1], 0.0),
        ):
            if subset:
                rates = {"lr": learning_rate, "initial_lr": learning_rate, "weight_decay": decay}
                settings.append({"params": subset, "group": group, **rates})
    return MasterAdamW(settings, masters, eps=eps, fused=True) if masters else AdamW(settings, eps=eps, fused=True)


def learning_rate_factor(
    schedule: str, optimizer_step: int, total_optimizer_steps: int, warmup_steps: int = 0
) -> float:
    """Return the share of the peak learning rate for update `optimizer_step`, counted from 0.

    The rate rises linearly and reaches the peak at update `warmup_steps`; then it is constant or falls along a line or
    a cosine. A falling rate would reach 0 one update after the last, so that no update has a rate of 0: the last one
    of N has 1 / N of the peak along a line. Raises ValueError for an unknown schedule.
    """
    if optimizer_step < warmup_steps:
        return (optimizer_step + 1) / (warmup_steps + 1)
    progress = (optimizer_step - warmup_steps) / max(1, total_optimizer_steps - warmup_steps)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1.0 - progress)
        case "cosine":
            return (1.0 + math.cos(math.pi * min(1.0, progress))) / 2
    raise ValueError(f"unknown schedule {schedule!r}: constant, linear or cosine")


def warmup_warning(warmup_steps: int, optimizer_steps: int) -> str | None:
    """Return a warning if the warm-up is not over before the last of the run's optimizer steps, else None."""
    if warmup_steps < optimizer_steps:
        return None
    return (
        f"warning: optim.warmup_steps {warmup_steps} covers all {optimizer_steps} optimizer steps of this run, and the "
        "learning rate never reaches its peak"
    )


def set_learning_rate(optimizer: AdamW, factor: float, first_factor: float = 1.0) -> None:
    """Set the rate of each group to `factor` times its initial rate; that of the first group also by `first_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor * (1.0 if group["group"] else first_factor)


def gradient_norm(parameters: Iterable[Parameter]) -> Tensor:
    """Return the joint norm of the gradients of `parameters`. []"""
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def clip_gradients(parameters: Iterable[Parameter], max_grad_norm: float, norm: Tensor) -> None:
    """Scale the gradients, whose joint norm is `norm`, to a joint norm of at most `max_grad_norm`."""
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
