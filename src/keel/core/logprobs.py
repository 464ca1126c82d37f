"""Log-probabilities and entropies of a categorical policy, at the temperature it samples with."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from keel import kernels


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(token) = z[token] - logsumexp(z), z = logits / temperature. [..., V], [...] -> [...]

    Raises ValueError if the temperature is not positive or the shapes do not fit.
    """
    scaled = _scaled(logits, temperature)
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit tokens {tuple(tokens.shape)}")
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H = logsumexp(z) - sum softmax(z) z, between 0 and log V. [..., V] -> [...]"""
    scaled = _scaled(logits, temperature)
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)


def logprobs_and_entropy(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy as a figure without gradient, in few passes. [..., V], [...] -> [...], [...]"""
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit tokens {tuple(tokens.shape)}")
    found: tuple[Tensor, Tensor] = LogprobsAndEntropy.apply(_scaled(logits, temperature), tokens)
    return found


class LogprobsAndEntropy(torch.autograd.Function):
    """d log pi(token) / d z = onehot(token) - softmax(z)."""

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if kernels.available(scaled) and tokens.dtype == torch.int64:
            chosen, entropies, statistics = kernels.logprobs(scaled, tokens)
            ctx.save_for_backward(scaled, tokens, statistics)
            ctx.mark_non_differentiable(entropies)
            return chosen, entropies
        logprobs = scaled.log_softmax(-1)
        probabilities = logprobs.exp()
        entropies = -torch.linalg.vecdot(probabilities, logprobs)
        ctx.save_for_backward(probabilities, tokens, None)
        ctx.mark_non_differentiable(entropies)
        return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        kept, tokens, statistics = ctx.saved_tensors
        if statistics is not None:
            return kernels.logprobs_back(kept, tokens, statistics, gradients[0]), None
        gradient = gradients[0].unsqueeze(-1)
        return (kept * -gradient).scatter_add_(-1, tokens.unsqueeze(-1), gradient), None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return wide if temperature == 1 else wide / temperature
