"""Statistics over the counted entries of a tensor: whatever lies in a masked place, NaN included, has no effect."""

import torch
from torch import Tensor


def check_shapes(*tensors: Tensor) -> None:
    """Raise ValueError unless all shapes are equal: broadcasting hides mistakes."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes differ: {shapes}")


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is True, exact zeros elsewhere (a product would keep NaN)."""
    check_shapes(x, mask)
    return x.masked_fill(~mask, 0.0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the counted entries, over everything or along `dim`."""
    return zero_outside(x, mask).sum() if dim is None else zero_outside(x, mask).sum(dim)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the counted entries; raises ValueError when there is none."""
    count = _count(mask)
    return masked_sum(x, mask) / count


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance (divided by N, so one entry gives 0 and not NaN) of the counted entries."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor, keep_mean: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), the mean put back if `keep_mean`; masked entries become 0.

    OpenAI's form (lm-human-preferences, biased variance).
    """
    mean = masked_mean(x, mask)
    mean = mean + masked_mean(x - mean, mask)  # takes out the rounding, so that equal entries become exact zeros
    return apply_whitening(x, mask, mean, masked_var(x, mask), keep_mean)


def apply_whitening(x: Tensor, mask: Tensor, mean: Tensor, var: Tensor, keep_mean: bool = False) -> Tensor:
    """Whiten with statistics that were taken elsewhere, such as over all ranks."""
    whitened = (x - mean) * torch.rsqrt(var + 1e-8)
    return zero_outside(whitened + mean if keep_mean else whitened, mask)


def last_counted_index(mask: Tensor) -> Tensor:
    """Index [B] of each row's last counted entry of a mask [B, T]; raises ValueError if a row has none."""
    if not bool(mask.any(dim=1).all()):
        raise ValueError("a row has no counted token")
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask * (positions + 1)).argmax(dim=1)


def _count(mask: Tensor) -> Tensor:
    count = mask.sum()
    if count == 0:
        raise ValueError("the mask counts no entry")
    return count
