"""Estimates of KL(pi || pi_ref) from sampled tokens, and the controller of its weight."""

import math

import torch
from torch import Tensor

from keel.core.masked import check_shapes

RESOLUTION = 1e-4
"""Nats up to which two correct float32 computations of one token's log-probability are taken as equal."""


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


def without_rounding(ref_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """Reference log-probs, with `logprobs` in the place of those that differ from it by RESOLUTION or less. [B, T] each

    So in float32 a policy that is still its reference has a KL of exactly zero and no gradient from it. A token's
    rounding is different in a decoding step, in a full pass and in another micro-batch, and AdamW, which divides a
    gradient by its own size, would make of such differences steps of full size in a random direction.
    """
    check_shapes(ref_logprobs, logprobs)
    logprobs = logprobs.detach()
    return torch.where((logprobs - ref_logprobs).abs() <= RESOLUTION, logprobs, ref_logprobs)


def updated_kl_coef(kl_coef: float, kl: float, target_kl: float, horizon: float, num_responses: int) -> float:
    """kl_coef * (1 + clip(kl / target_kl - 1, +-0.2) * num_responses / horizon), kl = objective/kl in nats a response.

    Ziegler et al. 2019, section 2.2. A KL that is not finite leaves the coefficient as it is.
    """
    if not math.isfinite(kl):
        return kl_coef
    error = min(max(kl / target_kl - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_responses / horizon)
