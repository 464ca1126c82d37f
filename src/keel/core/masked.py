"""Statistics over the counted entries of a tensor. Entries outside the mask have no effect, even if they are NaN."""

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Relative difference that counts as rounding: about 16 units in the last place of float32. A network's score of the
same text varies by about as much from batch to batch."""

AllSum = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks, such as `World.sum`."""


def one_process(tensor: Tensor) -> Tensor:
    """Return the tensor itself: the sum over all ranks where there is one."""
    return tensor


def check_shapes(*tensors: Tensor) -> None:
    """Raise ValueError unless all shapes are equal: broadcasting would hide mistakes."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes differ: {shapes}")


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """Return x with exact zeros where the mask is False."""
    check_shapes(x, mask)
    return x.masked_fill(~mask, 0.0)  # a product would keep NaN


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the sum of the counted entries, of the full tensor or along `dim`."""
    return zero_outside(x, mask).sum() if dim is None else zero_outside(x, mask).sum(dim)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the counted entries. Raises ValueError if no entry is counted."""
    count = mask.sum()
    if count == 0:
        raise ValueError("the mask counts no entry")
    return masked_sum(x, mask) / count


def masked_moments(x: Tensor, mask: Tensor, all_sum: AllSum = one_process) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the counted entries of all ranks; zeros if no entry is counted.

    The variance is divided by N, so that one entry has variance 0 and not NaN.
    """
    count = all_sum(mask.sum()).clamp(min=1)
    mean = all_sum(masked_sum(x, mask)) / count
    # The second pass removes the rounding of the mean, so that equal entries have a variance of exactly 0.
    mean = mean + all_sum(masked_sum(x - mean, mask)) / count
    return mean, all_sum(masked_sum((x - mean) ** 2, mask)) / count


def whiten(x: Tensor, mask: Tensor, all_sum: AllSum = one_process) -> Tensor:
    """Return (x - mean) / sqrt(var + 1e-8) with the moments of all ranks; masked entries become 0.

    This is the form of lm-human-preferences, with the biased variance. Differences from the mean that are rounding
    become exact zeros.
    """
    mean, var = masked_moments(x, mask, all_sum)
    differences = (x - mean).masked_fill((x - mean).abs() <= ROUNDING * mean.abs(), 0.0)
    return zero_outside(differences * torch.rsqrt(var + 1e-8), mask)


def last_counted_index(mask: Tensor) -> Tensor:
    """Return the index of each row's last counted entry. [B, T] -> [B]

    Raises ValueError if a row has none.
    """
    if not bool(mask.any(dim=1).all()):
        raise ValueError("a row has no counted token")
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask * (positions + 1)).argmax(dim=1)
