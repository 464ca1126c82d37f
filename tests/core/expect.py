"""Compare with literal numbers. The oracles are given to about ten digits, so the default tolerance is absolute."""

from collections.abc import Sequence

import torch
from torch import Tensor


def close(actual: Tensor | float, expected: float | Sequence[object], atol: float = 1e-8) -> None:
    """Fail unless `actual` has the shape and the values of the (nested) list `expected`; NaN never passes."""
    literal = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual).detach().double(), literal, rtol=0, atol=atol)


def gradient(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """d(sum of loss)/d(inputs)."""
    return torch.autograd.grad(loss.sum(), inputs)
