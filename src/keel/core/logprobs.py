"""Log-probabilities and entropies of a categorical policy, at the temperature it samples with."""

from torch import Tensor


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


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return logits.float() / temperature if logits.dtype.itemsize < 4 else logits / temperature
