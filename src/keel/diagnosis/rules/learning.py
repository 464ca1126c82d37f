"""Does the score rise, does it stay up, and does it rise on held-out prompts too?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.advice import scale_setting
from keel.diagnosis.chance import (
    RISE,
    SCORES,
    SIGNIFICANT,
    deviation_unit,
    fall_from_best,
    is_solved,
    prompts_per_step,
    resolution,
    score_rise,
)
from keel.diagnosis.evidence import applicable_texts, change_evidence, current_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    TESTED_ON_SYNTHETIC_RUNS,
    WARNING,
    Bounds,
    Documentation,
    Levels,
    Rule,
    Threshold,
    levels,
    threshold,
)
from keel.run.read.run import Run
from keel.run.read.series import at_least, at_most, carry_forward, first, last, policy_steps, trailing_mean, window

LATE, LATE_STEPS = 0.4, 10  # of the run, and at least so many steps
DETECTABLE = 0.5  # deviations: a rise of this size would have been detected
FALL = Bounds(warning=0.5, critical=1.0)  # deviations
GAP = 0.5  # deviations
MEAN_STEPS = 3

UPSTREAM = ("prompts-repeated", "no-signal", "reward-failures", "reward-inverted", "stale-normaliser", "reward-shift",
            "sampler-mismatch", "wrong-reference", "learning-rate-schedule", "updates-too-large", "updates-too-small",
            "updates-skipped", "value-offset", "critic-not-learning", "critic-lagging", "advantages-exploding",
            "credit-does-not-reach", "kl-too-tight", "missing-ends", "entropy-runaway", "policy-collapse",
            "kl-runaway")  # fmt: skip


def _not_learning_levels(run: Run) -> Levels:
    gain, errors = score_rise(run)
    is_late = policy_steps(run) >= max(LATE_STEPS, LATE * run.planned)
    # A rise that is within two standard errors must not be reported as none.
    is_flat = at_most(gain, RISE) & at_most(errors, SIGNIFICANT) & at_most(gain + resolution(run), DETECTABLE)
    return levels((is_late & is_flat & ~is_solved(run, window(run)), WARNING))


def _not_learning_evidence(run: Run) -> Sequence[Evidence]:
    gain, errors = (last(series) for series in score_rise(run))
    return [
        change_evidence(run, "objective/scores", f"{gain:+.2g} deviations, {errors:+.1f} standard errors"),
        change_evidence(run, "objective/kl"),
        current_evidence(run, "policy/step_kl"),
    ]


def _not_learning_causes(run: Run) -> Sequence[Cause]:
    spread, batch = last(run["objective/scores_std"]), int(run.setting("rollout.batch_size", 64))
    step_kl = last(run["policy/step_kl"])
    step_text = f"a step moves {step_kl:.2g} nats per token"
    return [
        Cause(
            "the run is too short or the updates are too small for this task",
            applicable_texts((step_kl < 0.002, step_text)),
            applicable_texts((step_kl > 0.02, step_text)),
            scale_setting(run, "optim.learning_rate", 3),
        ),
        Cause(
            "the score is too noisy for so few responses",
            (f"{batch} responses in each step; the deviation of their scores is {spread:.3g}",),
            (),
            Change("rollout.batch_size", f"{4 * batch} (it is {batch})"),
        ),
    ]


def _instability_levels(run: Run) -> Levels:
    fall, errors = fall_from_best(run)
    is_significant = at_least(errors, SIGNIFICANT)
    return levels(
        (is_significant & at_least(fall, FALL.warning), WARNING),
        (is_significant & at_least(fall, FALL.critical), CRITICAL),
    )


def _instability_evidence(run: Run) -> Sequence[Evidence]:
    fall, _ = fall_from_best(run)
    return [
        change_evidence(run, "objective/scores", f"{last(fall):.2g} deviations below its best"),
        change_evidence(run, "policy/step_kl"),
        change_evidence(run, "policy/entropy"),
    ]


def _instability_causes(run: Run) -> Sequence[Cause]:
    step_kl = last(trailing_mean(run["policy/step_kl"], window(run)))
    is_adaptive = run.setting("algorithm.target_kl") is not None
    return [
        Cause(
            "the updates became too large for the current policy",
            applicable_texts((step_kl > 0.05, f"a step moves {step_kl:.2g} nats per token")),
            applicable_texts((step_kl < 0.02, f"a step moves only {step_kl:.2g} nats per token")),
            scale_setting(run, "optim.learning_rate", 0.3),
        ),
        Cause(
            "the adaptive KL penalty pulls the policy back",
            applicable_texts((is_adaptive, "kl_coef is adaptive (target_kl is set)")),
            applicable_texts((not is_adaptive, "kl_coef is constant")),
            Change("algorithm.kl_horizon", "a longer one"),
        ),
        Cause("the scorer changed", (), (), Change("", "score a few responses of the first steps again")),
    ]


def _memorised_levels(run: Run) -> Levels:
    """Compare the gap between training and held-out prompts with its value at the first evaluation.

    The error of its growth assumes that an evaluation has as many prompts as a step.
    """
    training, held_out = trailing_mean(run[SCORES], MEAN_STEPS), run["evaluate/score"]
    gap = np.where(np.isfinite(held_out), training - held_out, np.nan)
    growth = carry_forward(gap) - max(first(gap), 0.0)
    unit = deviation_unit(run, SCORES)
    error = unit * np.sqrt(2 / prompts_per_step(run))
    return levels((at_least(growth, GAP * unit) & at_least(growth, SIGNIFICANT * error), WARNING))


def _memorised_evidence(run: Run) -> Sequence[Evidence]:
    return [
        change_evidence(run, "objective/scores", "on the training prompts"),
        Evidence("evaluate/score", f"{last(run['evaluate/score']):.3g} on held-out prompts"),
    ]


def _memorised_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "there are too few training prompts, and the policy memorises them",
            (),
            (),
            Change("prompts.path", "more prompts, or fewer steps"),
        ),
        Cause(
            "the held-out prompts are of another kind",
            (),
            (),
            Change("evaluate.prompts", "prompts from the same source; keel drift compares the two files"),
        ),
    ]


RULES = (
    Rule(
        "instability",
        "The score fell below an earlier, higher level.",
        "update",
        _instability_levels,
        _instability_evidence,
        _instability_causes,
        Documentation(
            measure="fall of `objective/scores` from its best window (median of a window's steps)",
            thresholds=(threshold("fall, in sd", FALL),),
            note=f"The fall must also be {SIGNIFICANT:g} se.",
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        follows=(*UPSTREAM, "reward-hacking", "length-exploitation"),
    ),
    Rule(
        "prompts-memorised",
        "The score rises on training prompts and not on held-out prompts.",
        "prompts",
        _memorised_levels,
        _memorised_evidence,
        _memorised_causes,
        Documentation(
            measure=f"gap = mean of `objective/scores` over {MEAN_STEPS} steps - `evaluate/score`",
            thresholds=(
                Threshold(
                    "growth of the gap since the first evaluation",
                    warning=f">= {GAP:g} sd and >= {SIGNIFICANT:g} * sd * sqrt(2 / prompts in a step)",
                ),
            ),
            note="Only with `evaluate.every`.",
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        patience=1,
        follows=("prompts-repeated",),
    ),
    Rule(
        "not-learning",
        "The score does not rise.",
        "update",
        _not_learning_levels,
        _not_learning_evidence,
        _not_learning_causes,
        Documentation(
            measure=f"rise of `objective/scores`, after {LATE:.0%} of the run and {LATE_STEPS} steps",
            thresholds=(
                Threshold("rise, in sd", warning=f"<= {RISE:g}"),
                Threshold("rise, in se", warning=f"<= {SIGNIFICANT:g}"),
                Threshold("rise + 2 se, in sd", warning=f"<= {DETECTABLE:g}"),
            ),
            combine="All rows must hold.",
            note="Steps in which only the critic learns do not count. A solved task (`no-signal`) is not reported.",
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        follows=UPSTREAM,
    ),
)
