"""Compare two ways to compute log-probabilities: token by token while sampling, and in one pass over a row."""

import math

import torch

from keel.data.batches import Rollouts, select_rows
from keel.errors import ConfigError
from keel.learn.targets import analyze_all
from keel.models.actor_critic import ActorCritic, Analysis
from keel.models.heads import compute_dtype, unwrap_model

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference of one token's log-probability between two correct computations."""
MEAN_TOLERANCE, LOOSE_TOLERANCE = 0.1, 2.0
"""Largest mean of these differences in bfloat16, and largest difference of one token. Those of correct models are 0.05
and 0.4 (docs/numerics-log.md)."""


def compare_passes(
    actor_critic: ActorCritic,
    probe: Rollouts,
    temperature: float,
    microbatch_tokens: int,
    where: str,
    sampler_dtype: torch.dtype | None = None,
) -> tuple[Analysis, dict[str, float]]:
    """Check that the sampler's log-probs equal those of a full pass, and those of a row alone equal those in a batch.

    Args:
        sampler_dtype: number format of a sampler that computes in another one than the model.

    Returns the full pass and the measured differences. Raises ConfigError if they are larger than rounding.
    """
    kind, mask = type(unwrap_model(actor_critic.policy)).__name__, probe.response_mask
    trained = analyze_all(actor_critic, probe, temperature, microbatch_tokens)
    gaps = (trained.logprobs - probe.logprobs)[mask].abs()
    fix = "use another architecture"
    if compute_dtype(actor_critic.policy).itemsize < 4:
        fix = "use dtype float32, or another architecture"
    if not gaps_are_rounding(gaps, sampler_dtype or compute_dtype(actor_critic.policy)):
        what = f"sampler and trainer disagree by {float(gaps.max()):.2g} (mean {float(gaps.mean()):.2g})"
        raise ConfigError(f"{kind}: {what} on a token's log-probability", where=where, fix=fix)
    first = select_rows(probe, [0])
    alone = analyze_all(actor_critic, first, temperature, 1, with_values=False)
    width = first.response_mask.shape[1]
    padding_gaps = (alone.logprobs - trained.logprobs[:1, :width])[first.response_mask].abs()
    if not logprobs_agree(padding_gaps, actor_critic):
        what = f"padding changes a token's log-probability by {float(padding_gaps.max()):.2g}"
        raise ConfigError(f"{kind}: {what}", where=where, fix=fix)
    measured = {
        "check/logprob_gap": float(gaps.max()),
        "check/logprob_gap_mean": float(gaps.mean()),
        "check/padding_gap": float(padding_gaps.max()),
    }
    return trained, measured


def logprobs_agree(gaps: torch.Tensor, actor_critic: ActorCritic) -> bool:
    """Return whether differences of log-probs are as small as rounding in the number format of a model."""
    return gaps_are_rounding(gaps, compute_dtype(actor_critic.policy))


def gaps_are_rounding(gaps: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether differences of log-probs are as small as rounding in this number format. NaN is not.

    In bfloat16 the mean is compared, with a higher limit for few tokens, and the largest with a loose limit.
    """
    if dtype in TOLERANCE:
        return bool((gaps <= TOLERANCE[dtype]).all())
    mean = MEAN_TOLERANCE * (1 + 4 / math.sqrt(max(len(gaps), 1)))
    return bool(gaps.mean() <= mean and (gaps <= LOOSE_TOLERANCE).all())
