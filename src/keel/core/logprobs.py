"""Log-probabilities and entropies of a categorical policy, at its sampling temperature.

The largest logit is subtracted before the division by the temperature. Long sums are pairwise or in double precision.
Results are therefore exact up to their final rounding, for any vocabulary size and any offset of the logits.
"""

import math
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from keel import kernels

AT_ONCE = 2**18
"""Logits per chunk of torch's operations on a CPU, so that intermediate results stay in its cache."""
LEAST = -1e4
"""Lower bound of a shifted logit. Its probability is 0, and unlike -inf its product with 0 is not NaN."""


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute log pi(token) = z[token] - logsumexp(z), z = logits / temperature. [..., V], [...] -> [...]

    Raises ValueError if the temperature is not positive or the shapes do not match.
    """
    return logprobs_and_entropy(logits, tokens, temperature)[0]


def logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute log pi(token) and the entropy in few passes over memory. [..., V], [...] -> [...], [...]

    With z = logits / temperature, H = logsumexp(z) - sum softmax(z) z, which is between 0 and log V.

    Args:
        entropy_gradient: whether the entropy has a gradient.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit tokens {tuple(tokens.shape)}")
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    if wide.dim() == 2:  # on a small vocabulary the reshapes below take up to a tenth of the time
        return cast(tuple[Tensor, Tensor], LogprobsAndEntropy.apply(wide, tokens, temperature, entropy_gradient))
    rows = wide.reshape(-1, wide.shape[-1]), tokens.reshape(-1)
    logprobs, entropies = LogprobsAndEntropy.apply(*rows, temperature, entropy_gradient)
    return logprobs.view(tokens.shape), entropies.view(tokens.shape)


class LogprobsAndEntropy(torch.autograd.Function):
    """Log-probabilities and entropies with their gradients written out. [N, V], [N] -> [N], [N]

    With p = softmax(z): d log pi(token) / dz = onehot(token) - p, and dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, entropy_gradient: bool) -> Any:
        ctx.temperature, ctx.compiled = temperature, kernels.available(logits) and tokens.dtype == torch.int64
        forward = kernels.logprobs_with_entropy if ctx.compiled else _forward
        logprobs, entropies, *saved = forward(logits, tokens, temperature)
        ctx.save_for_backward(logits, tokens, *saved)
        ctx.set_materialize_grads(False)  # an entropy without a gradient then costs the backward pass nothing
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, entropy_gradient: Tensor | None) -> Any:
        logits, tokens, statistics, *weights = ctx.saved_tensors
        gradient = torch.zeros_like(statistics[:, 0]) if gradient is None else gradient
        back = kernels.logprobs_with_entropy_back if ctx.compiled else _backward
        for_logits = back(logits, tokens, statistics, gradient, entropy_gradient, ctx.temperature, *weights)
        return for_logits, None, None, None


def _forward(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute `kernels.logprobs_with_entropy` with torch's operations.

    If there is one chunk only, its exponentials are returned as well, for the gradient.
    """
    chunks = [_sums(logits[rows], temperature) for rows in _chunks(logits)]
    weights = chunks[0][3] if len(chunks) == 1 else None
    columns = list(zip(*chunks, strict=True))[:3]
    top, total, weighted = (column[0] if len(column) == 1 else torch.cat(column) for column in columns)
    exact = total.double()
    log_total = exact.log()
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double().sub_(top)
    logprobs = (chosen if temperature == 1 else chosen.div_(temperature)).sub_(log_total)
    entropies = log_total.sub_(weighted / exact).clamp_(0, _most(logits.shape[-1], logits.dtype)).to(logits.dtype)
    return logprobs.to(logits.dtype), entropies, torch.stack([top, total, entropies], -1), weights


def _sums(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the largest logit, the sums of exp(x) and of exp(x) x, and exp(x); x = (logits - largest) / temperature.

    [N, V] -> [N], [N], [N], [N, V]
    """
    top = logits.amax(-1, keepdim=True)
    x = _shifted(logits, top, temperature)
    weights = x.exp()
    return top.squeeze(-1), weights.sum(-1), x.clamp_(min=LEAST).mul_(weights).sum(-1), weights


def _backward(
    logits: Tensor,
    tokens: Tensor,
    statistics: Tensor,
    gradient: Tensor,
    entropy_gradient: Tensor | None,
    temperature: float,
    weights: Tensor | None,
) -> Tensor:
    """Compute `kernels.logprobs_with_entropy_back` with torch's operations."""
    top, total, entropies = statistics.unsqueeze(-1).unbind(1)
    outward = gradient.unsqueeze(-1) / temperature
    factor = outward / -total
    if weights is not None and entropy_gradient is None:
        return (weights * factor).scatter_add_(-1, tokens.unsqueeze(-1), outward)
    result = torch.empty_like(logits)
    for rows in _chunks(logits):
        x = _shifted(logits[rows], top[rows], temperature, out=result[rows])
        if entropy_gradient is None:
            x.exp_().mul_(factor[rows])
            continue
        slope = entropy_gradient[rows].unsqueeze(-1) / (-temperature * total[rows])
        surprise = x.clamp(min=LEAST) + (entropies[rows] - total[rows].log())
        x.exp_().mul_(surprise.mul_(slope).add_(factor[rows]))
    return result.scatter_add_(-1, tokens.unsqueeze(-1), outward)


def _shifted(logits: Tensor, top: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    x = torch.sub(logits, top, out=out)
    return x if temperature == 1 else x.div_(temperature)


def _chunks(logits: Tensor) -> list[slice]:
    """Return slices of rows that fit a CPU's cache; on other devices one slice of all rows."""
    count, words = logits.shape
    step = max(1, AT_ONCE // words) if logits.is_cpu else max(1, count)
    return [slice(first, first + step) for first in range(0, max(count, 1), step)]


@cache
def _most(words: int, dtype: torch.dtype) -> float:
    """Return the largest number of this type that is not above log(words), the bound of a rounded entropy."""
    nearest, limit = torch.tensor(math.log(words), dtype=dtype), math.log(words)
    return float(nearest if nearest.item() <= limit else nearest.nextafter(torch.zeros_like(nearest)))
