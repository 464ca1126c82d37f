"""Estimates of KL(pi || pi_ref) from sampled tokens, and the controller of its weight."""

import math

import torch
from torch import Tensor

from keel.core.masked import check_shapes

RESOLUTION = 1e-4
"""In nats: two correct float32 computations of one token's log-probability may differ by this much."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate the KL per token from d = logprobs - ref_logprobs. [B, T], [B, T] -> [B, T]

    - k1 = d: unbiased.
    - k2 = d^2 / 2: a biased value, whose gradient is that of the KL.
    - k3 = exp(-d) - 1 + d: unbiased and never negative; its gradient is that of KL(pi_ref || pi).

    Schulman 2020, "Approximating KL divergence".
    """
    check_shapes(logprobs, ref_logprobs)
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        # The limit keeps the estimate finite for a token that the policy no longer samples.
        return torch.exp((-difference).clamp(max=60.0)) - 1 + difference
    raise ValueError(f"unknown estimator {estimator!r}: k1, k2 or k3")


def without_rounding(ref_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """Replace reference log-probs that differ from `logprobs` by RESOLUTION or less by `logprobs`. [B, T] each

    In float32, a policy that equals its reference then has a KL of exactly zero, without a gradient. The rounding of a
    token differs between a decoding step, a full pass and another micro-batch. AdamW divides a gradient by its size,
    so such differences would become full-size steps in a random direction.
    """
    check_shapes(ref_logprobs, logprobs)
    logprobs = logprobs.detach()
    return torch.where((logprobs - ref_logprobs).abs() <= RESOLUTION, logprobs, ref_logprobs)


def updated_kl_coef(kl_coef: float, kl: float, target_kl: float, horizon: float, num_responses: int) -> float:
    """Compute kl_coef * (1 + clip(kl / target_kl - 1, -0.2, 0.2) * num_responses / horizon).

    Ziegler et al. 2019, section 2.2. A KL that is not finite does not change the coefficient.

    Args:
        kl: `objective/kl`, in nats per response.
    """
    if not math.isfinite(kl):
        return kl_coef
    error = min(max(kl / target_kl - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_responses / horizon)
