"""Does the run reach what it is for, and keep it?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.chance import (
    SCORES,
    SURE,
    fall_from_best,
    is_solved,
    prompts_per_step,
    resolution,
    score_rise,
    yardstick,
)
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    WARNING,
    Levels,
    Rule,
    applicable_texts,
    change_evidence,
    is_now,
    levels,
    scale_setting,
)
from keel.run.read.run import Run
from keel.run.read.series import at_least, at_most, carry_forward, first, last, policy_steps, trailing_mean, window

UPSTREAM = ("prompts-repeated", "no-signal", "reward-failures", "reward-inverted", "stale-normaliser", "reward-shift",
            "sampler-mismatch", "wrong-reference", "learning-rate-schedule", "updates-too-large", "updates-too-small",
            "updates-skipped", "value-offset", "critic-not-learning", "critic-lagging", "advantages-exploding",
            "credit-does-not-reach", "kl-too-tight", "missing-ends", "entropy-runaway", "policy-collapse",
            "kl-runaway")  # fmt: skip


def _not_learning(run: Run) -> Levels:
    """No rise by a quarter of a deviation, and half a one would have been seen."""
    gain, errors = score_rise(run)
    late = policy_steps(run) >= max(10, 0.4 * run.planned)
    flat = at_most(gain, 0.25) & at_most(errors, SURE) & at_most(gain + resolution(run), 0.5)
    return levels((late & flat & ~is_solved(run, window(run)), WARNING))


def _not_learning_evidence(run: Run) -> Sequence[Evidence]:
    gain, errors = (last(part) for part in score_rise(run))
    return [
        change_evidence(run, "objective/scores", f"{gain:+.2g} deviations, {errors:+.1f} standard errors"),
        change_evidence(run, "objective/kl"),
        is_now(run, "policy/step_kl"),
    ]


def _not_learning_causes(run: Run) -> Sequence[Cause]:
    spread, batch = last(run["objective/scores_std"]), int(run.setting("rollout.batch_size", 64))
    return [
        Cause(
            "the run is too short or the updates too timid for this task",
            applicable_texts(
                (last(run["policy/step_kl"]) < 0.002, f"a step moves {last(run['policy/step_kl']):.2g} nats a token")
            ),
            applicable_texts(
                (last(run["policy/step_kl"]) > 0.02, f"a step moves {last(run['policy/step_kl']):.2g} nats a token")
            ),
            scale_setting(run, "optim.learning_rate", 3),
        ),
        Cause(
            "the score is too noisy for so few answers",
            (f"{batch} answers a step, their scores' deviation is {spread:.3g}",),
            (),
            Change("rollout.batch_size", f"{4 * batch} (it is {batch})"),
        ),
    ]


def _unstable(run: Run) -> Levels:
    fall, errors = fall_from_best(run)
    sure = at_least(errors, SURE)
    return levels((sure & at_least(fall, 0.5), WARNING), (sure & at_least(fall, 1.0), CRITICAL))


def _unstable_evidence(run: Run) -> Sequence[Evidence]:
    fall, _ = fall_from_best(run)
    return [
        change_evidence(run, "objective/scores", f"{last(fall):.2g} deviations below its best"),
        change_evidence(run, "policy/step_kl"),
        change_evidence(run, "policy/entropy"),
    ]


def _unstable_causes(run: Run) -> Sequence[Cause]:
    jump = last(trailing_mean(run["policy/step_kl"], window(run)))
    return [
        Cause(
            "the updates became too large for where the policy is now",
            applicable_texts((jump > 0.05, f"a step moves {jump:.2g} nats a token")),
            applicable_texts((jump < 0.02, f"a step moves only {jump:.2g} nats a token")),
            scale_setting(run, "optim.learning_rate", 0.3),
        ),
        Cause(
            "the KL pulls the policy back",
            applicable_texts((run.setting("algorithm.target_kl") is not None, "kl_coef adapts itself")),
            applicable_texts((run.setting("algorithm.target_kl") is None, "kl_coef stays the same")),
            Change("algorithm.kl_horizon", "a longer one"),
        ),
        Cause(
            "the scorer changed",
            (),
            (),
            Change("", "score a few answers of the first steps again"),
        ),
    ]


def _memorised(run: Run) -> Levels:
    """The gap between training and held-out prompts has grown by half a deviation since the first evaluation, and by
    more than chance makes of two evaluations, each of which is taken to see as many prompts as a step."""
    seen, held_out = trailing_mean(run[SCORES], 3), run["evaluate/score"]
    gap = np.where(np.isfinite(held_out), seen - held_out, np.nan)
    grown = carry_forward(gap) - max(first(gap), 0.0)
    error = yardstick(run, SCORES) * np.sqrt(2 / prompts_per_step(run))
    return levels((at_least(grown, 0.5 * yardstick(run, SCORES)) & at_least(grown, SURE * error), WARNING))


def _memorised_evidence(run: Run) -> Sequence[Evidence]:
    return [
        change_evidence(run, "objective/scores", "on the training prompts"),
        Evidence("evaluate/score", f"{last(run['evaluate/score']):.3g} on held-out prompts"),
    ]


def _memorised_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the training prompts are too few and are learned by heart",
            (),
            (),
            Change("prompts.path", "more prompts, or fewer steps"),
        ),
        Cause(
            "the held-out prompts are of another kind",
            (),
            (),
            Change("evaluate.prompts", "prompts drawn from the same source; keel drift says how far they are apart"),
        ),
    ]


RULES = (
    Rule(
        "instability",
        "The score was higher before: the run lost what it had learned.",
        "update",
        _unstable,
        _unstable_evidence,
        _unstable_causes,
        follows=(*UPSTREAM, "reward-hacking", "length-exploitation"),
    ),
    Rule(
        "prompts-memorised",
        "The score rises on the training prompts, and not on held-out ones.",
        "prompts",
        _memorised,
        _memorised_evidence,
        _memorised_causes,
        patience=1,
        follows=("prompts-repeated",),
    ),
    Rule(
        "not-learning",
        "The score does not rise.",
        "update",
        _not_learning,
        _not_learning_evidence,
        _not_learning_causes,
        follows=UPSTREAM,
    ),
)
