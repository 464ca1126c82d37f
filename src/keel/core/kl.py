"""Estimates of KL(pi || pi_ref) from sampled tokens, and the controller of its weight."""

import math

import torch
from torch import Tensor

from keel.core.masked import check_shapes


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate from d = logprobs - ref_logprobs. [B, T], [B, T] -> [B, T]

    k1 = d (unbiased), k2 = d^2 / 2 (biased value; its gradient is the KL's), k3 = exp(-d) - 1 + d (unbiased, never
    negative; its gradient is that of KL(pi_ref || pi)). Schulman 2020, "Approximating KL divergence".
    The argument of the exponential is limited to 60 so that a vanished token gives a huge number and not infinity.
    """
    check_shapes(logprobs, ref_logprobs)
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return torch.exp((-difference).clamp(max=60.0)) - 1 + difference
    raise ValueError(f"unknown estimator {estimator!r}: k1, k2 or k3")


def updated_kl_coef(kl_coef: float, kl: float, target_kl: float, horizon: float, num_responses: int) -> float:
    """kl_coef * (1 + clip(kl / target_kl - 1, +-0.2) * num_responses / horizon), kl = objective/kl in nats a response.

    Ziegler et al. 2019, section 2.2. A KL that is not finite leaves the coefficient as it is.
    """
    if not math.isfinite(kl):
        return kl_coef
    error = min(max(kl / target_kl - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_responses / horizon)
