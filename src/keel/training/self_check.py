"""The self-check before the first update, on real prompts. It takes seconds.

Without it, the faults that it detects would spoil a run silently: a negative KL, initial ratios other than 1, an end
token that is never learned.
"""

import math
from dataclasses import replace
from functools import partial

import torch

from keel import kernels
from keel.core.diagnostics import clipfrac
from keel.data.batches import Rollouts, select_rows
from keel.errors import ConfigError, RewardError
from keel.learn.masters import trained_weights
from keel.learn.pass_check import compare_passes, logprobs_agree
from keel.learn.targets import reference_logprobs
from keel.models.actor_critic import Analysis
from keel.rollout.lengths import length_warnings
from keel.rollout.scorers import RewardModelScorer, Scorer
from keel.shards import full_tensor
from keel.terminal import print_line
from keel.training.engine_check import check_engine
from keel.training.engine_setup import engine_dtype
from keel.training.setup import TrainingSetup
from keel.world import raise_together

PROBE_ROWS = 2, 8
"""Smallest and largest number of responses to check; in between, one in twenty of a step's responses."""
PROBE_TOKENS = 8
"""Longest response of the check. Each token costs a pass through the policy, however few the responses are."""
SCORE_TOLERANCE, SCORE_TOLERANCE_16_BIT = 1e-3, 0.05
"""Largest difference between scores of one response in two batches, in units of the largest score."""


def self_check(setup: TrainingSetup) -> dict[str, float]:
    """Run every check on a few responses, and return the measurements. Raises ConfigError or RewardError."""
    _check_lengths(setup)
    by_engine = check_engine(setup)
    count = min(max(PROBE_ROWS[0], setup.config.rollout.batch_size // 20), PROBE_ROWS[1])
    probe = setup.respond(step=1, at_most=count, max_tokens=PROBE_TOKENS)
    _check_trainable(setup)
    _check_dropout(setup)
    _check_ends(setup, probe)
    trained, measured = _check_logprobs(setup, probe)
    measured |= _check_reference(setup, probe, trained)
    compiled = kernels.available(next(setup.actor_critic.policy.parameters()))
    return {**by_engine, **measured, **_check_scores(setup, probe, count), "check/kernels": float(compiled)}


def require_weight_change(initial: torch.Tensor, updated: torch.Tensor) -> None:
    """Raise ConfigError if the first update changed no weight, by the fingerprints of both states."""
    if torch.equal(initial, updated):
        raise ConfigError("the first update changed no weight", fix="raise optim.learning_rate")


def weight_fingerprint(setup: TrainingSetup) -> torch.Tensor:
    """Return the sum of each trained weight tensor, which changes when the weights do."""
    # A first step may be smaller than the rounding of a 16-bit weight, but not than that of its master.
    weights = trained_weights(setup.updater.optimizer, setup.actor_critic.named_parameters())
    return torch.stack([full_tensor(weight.double().sum()).cpu() for weight in weights.values()])


def _check_lengths(setup: TrainingSetup) -> None:
    """Check that the reward models can read every prompt. Warn where a response may not fit beside it."""
    prompts, longest = [*setup.prompts, *setup.held_out], setup.config.rollout.max_response_tokens
    for line in length_warnings(setup.scorers, prompts, longest):
        if setup.world.is_main:
            print_line(line)


def _check_trainable(setup: TrainingSetup) -> None:
    if not setup.actor_critic.policy_parameters():
        raise ConfigError("the policy has no trainable parameter", where="policy", fix="check lora.target_modules")


def _check_dropout(setup: TrainingSetup) -> None:
    # Dropout also acts inside attention functions, so the mode of every module counts, not the dropout modules alone.
    for name in ("policy", "critic"):
        model = getattr(setup.actor_critic, name)
        if model is not None and any(module.training for module in model.modules()):
            raise ConfigError(f"dropout is on: the {name} is in training mode", where=name, fix="call its eval()")


def _check_ends(setup: TrainingSetup, probe: Rollouts) -> None:
    """Check the end tokens inside the response mask: truncated responses have none, and others have one.

    Responses that a stop text ended may have none.
    """
    is_end = torch.isin(probe.response_tokens, torch.tensor(setup.end_ids, device=probe.response_tokens.device))
    ends = (is_end & probe.response_mask).sum(1)
    ended = (~probe.truncated).long()
    if not bool(((ends == ended) if not setup.stop_texts else (ends <= ended)).all()):
        raise ConfigError("end tokens and response mask disagree", where="sampler", fix="report this as a bug of keel")


def _check_logprobs(setup: TrainingSetup, probe: Rollouts) -> tuple[Analysis, dict[str, float]]:
    """Check that sampler and trainer compute the same log-probs, so that ratio = 1 before the first update.

    Returns the trainer's full pass, and the measurements.
    """
    mask, algorithm = probe.response_mask, setup.config.algorithm
    temperature, at_once = setup.config.rollout.temperature, algorithm.microbatch_tokens
    dtype = engine_dtype(setup.config) if setup.engine.is_external else None
    trained, measured = compare_passes(setup.actor_critic, probe, temperature, at_once, "policy", dtype)
    ones = torch.ones_like(trained.logprobs[mask])
    ratio = torch.exp(trained.logprobs - probe.logprobs)[mask]
    clipped = clipfrac(
        trained.logprobs[mask], probe.logprobs[mask], ones, algorithm.clip_range_low, algorithm.clip_range_high
    )
    return trained, {**measured, "check/ratio": float(ratio.mean()), "check/clipfrac": float(clipped.mean())}


def _check_reference(setup: TrainingSetup, probe: Rollouts, trained: Analysis) -> dict[str, float]:
    """Check that the KL is 0 at the start, unless `reference` is another model."""
    if setup.reference is None:
        return {}
    ref_logprobs = reference_logprobs(
        setup.reference, probe, setup.targets.temperature, setup.targets.microbatch_tokens
    )
    gaps = (trained.logprobs - ref_logprobs)[probe.response_mask].abs()
    gap = float(gaps.max())
    if setup.config.reference is None and not logprobs_agree(gaps, setup.actor_critic):
        raise ConfigError(
            f"the reference differs from the initial policy: log-probs differ by {gap:.2g}",
            where="reference",
            fix="report this as a bug of keel",
        )
    return {"check/reference_gap": gap}


def _check_scores(setup: TrainingSetup, probe: Rollouts, count: int) -> dict[str, float]:
    """Check that scores, and missing scores, depend neither on the batch around a response nor on the call."""
    # A judge that compares needs the full groups, which the probe does not have.
    setup = replace(setup, scorers=[scorer for scorer in setup.scorers if not getattr(scorer, "compares", False)])
    if not setup.scorers:
        return {}
    try:
        first, second = _score_twice(setup, probe)
    except RewardError:
        if setup.config.rollout.max_response_tokens <= PROBE_TOKENS:
            raise
        # A scorer may have no score for the beginning of a response, such as JSON that is not closed.
        first, second = _score_twice(setup, setup.respond(step=1, at_most=count))
    worst = 0.0
    for scorer in (scorer for scorer in setup.scorers if not scorer.noisy):
        gap = _score_gap(first[scorer.name], second[scorer.name])
        worst = max(worst, gap)
        if gap > score_tolerance(scorer):
            raise RewardError(
                f"scores the same responses differently the second time, in another batch (by {gap:.2g} of their size)",
                where=f"scorer {scorer.name}",
                fix="let the score depend on prompt and response alone, or declare the scorer noisy: true",
            )
    return {"check/score_gap": worst}


def _score_twice(setup: TrainingSetup, probe: Rollouts) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the scores of each scorer by its name, of all responses together and of two halves of them, row by row.

    Raises RewardError, on every process, where a scorer fails or no response has a score.
    """
    rows = list(range(len(probe.texts)))
    halves = [half for half in (rows[::2], rows[1::2]) if half]
    order = torch.tensor([row for half in halves for row in half], device=setup.world.device).argsort()
    batches = [probe, *(select_rows(probe, half) for half in halves)]
    together, *separate = [raise_together(setup.world, partial(setup.score, batch)) for batch in batches]
    if not bool(setup.world.sum(together.kept.sum())):
        raise RewardError("no response could be scored", where="rewards", fix="check the reward functions")
    second = {name: torch.cat([half.by_scorer[name] for half in separate])[order] for name in together.by_scorer}
    return together.by_scorer, second


def score_tolerance(scorer: Scorer) -> float:
    """Return the largest difference between two scores of one response, in units of the largest score."""
    if isinstance(scorer, RewardModelScorer) and scorer.itemsize < 4:
        return SCORE_TOLERANCE_16_BIT
    return SCORE_TOLERANCE


def _score_gap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Compute the largest difference, in units of the largest score (at least 1).

    It is infinite if a response has a score in one of the two only.
    """
    if not torch.equal(first.isfinite(), second.isfinite()):
        return math.inf
    first, second = first.nan_to_num(), second.nan_to_num()
    return float((first - second).abs().max()) / max(1.0, float(first.abs().max()))
