"""Does a step have enough different prompts, and do its scores tell good responses from bad ones?"""

from collections.abc import Sequence
from math import ceil

import numpy as np

from keel.algorithms import ALGORITHM_TRAITS
from keel.diagnosis.advice import raise_kl, scale_setting
from keel.diagnosis.chance import (
    NEAR_BEST,
    RISE,
    RISE_ERRORS,
    SCORES,
    is_solved,
    prompts_per_step,
    responses_per_step,
    score_rise,
)
from keel.diagnosis.evidence import applicable_texts, current_evidence, format_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    MEASURED_IN_ZOO,
    NOTICE,
    WARNING,
    Documentation,
    Levels,
    Rule,
    Threshold,
    levels,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import at_least, at_most, highest, last, trailing_mean

FEW_PROMPTS = 4  # in a step, below which their variety means nothing
REPEATED = 0.5  # of the prompts that could be different
SINGLE = 1.5  # different prompts, which a count of one does not exceed after rounding
ENOUGH_RESPONSES = 256  # with equal scores: where one response in fifty is good, so many would contain one
ENOUGH_GROUPS = ENOUGH_RESPONSES // 4
SHORTEST = 3  # steps
EQUAL_NOTICE, EQUAL_WARNING, EQUAL_CRITICAL = 0.7, 0.85, 0.95  # of the groups
RISING, RISING_ERRORS = 0.1, 1.5  # deviations and standard errors
HOPELESS_AFTER = 0.2  # of the run


def _repeated_levels(run: Run) -> Levels:
    distinct = run["prompts/distinct"] * responses_per_step(run)
    enough = np.full(len(run.steps), prompts_per_step(run) >= FEW_PROMPTS)
    return levels(
        (enough & at_most(distinct, REPEATED * prompts_per_step(run)), WARNING),
        (enough & at_most(distinct, SINGLE), CRITICAL),
    )


def _repeated_evidence(run: Run) -> Sequence[Evidence]:
    batch = int(run.setting("rollout.batch_size", 64))
    count = round(last(run["prompts/distinct"]) * batch)
    return [Evidence("prompts/distinct", f"{count} different prompts for the {batch} responses of a step")]


def _repeated_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the data set has few prompts, or the same prompt many times",
            ("a step samples prompts without replacement, so they repeat only when the data is used up",),
            (),
            Change("prompts.path", "a file with at least as many different prompts as the run uses"),
        )
    ]


def _spread(run: Run) -> Series:
    """Return the deviation of a step's shaped scores, 0 where it is negligible beside their mean. [S]"""
    shaped = "objective/shaped_scores" if run.has("objective/shaped_scores_std") else SCORES
    spread, size = run[f"{shaped}_std"], np.nan_to_num(np.abs(run[shaped]))
    return np.where(at_most(spread, 1e-6 * np.maximum(size, 1.0)), 0.0, spread)


def _signal_levels(run: Run) -> Levels:
    width = max(SHORTEST, ceil(ENOUGH_RESPONSES / responses_per_step(run)))
    none = at_most(trailing_mean(_spread(run), width), 0.0) & (run.steps >= width)
    groups_width = max(SHORTEST, ceil(ENOUGH_GROUPS / prompts_per_step(run)))
    equal = trailing_mean(run["groups/equal_scores"], groups_width)
    gain, errors = score_rise(run)
    rising = at_least(gain, RISING) & at_least(errors, RISING_ERRORS)
    hopeless = at_least(equal, EQUAL_CRITICAL) & (run.steps >= HOPELESS_AFTER * run.planned)
    return levels(
        (at_least(equal, EQUAL_NOTICE) | none, NOTICE),
        # Also where the task is solved: prompts that are too easy from the start are a fault of the data.
        (at_least(equal, EQUAL_WARNING) & ~rising, WARNING),
        ((hopeless | none) & ~is_solved(run, width), CRITICAL),
    )


def _find_signal_start(run: Run, index: int) -> int:
    """Return 0 where scores never differed: then nothing that happened in the run can have caused it."""
    return 0 if at_most(_spread(run)[:index], 0.0).all() else index


def _signal_evidence(run: Run) -> Sequence[Evidence]:
    spread = current_evidence(run, "objective/shaped_scores_std", "0: all responses get the same score")
    if not run.has("groups/equal_scores"):
        return [spread]
    return [current_evidence(run, "groups/equal_scores", "share of prompts whose responses all score the same"), spread]


def _signal_causes(run: Run) -> Sequence[Cause]:
    mean = last(run[SCORES])
    lowest, largest = -last(highest(-run[SCORES])), last(highest(run[SCORES]))
    is_constant = last(run["objective/scores_std"]) <= 1e-6 * max(1.0, abs(mean))
    gain = last(score_rise(run)[0])
    is_clipped = run.setting("reward.clip") is not None and not is_constant
    are_alike = last(run["response/distinct"]) < 0.3
    causes = [
        (
            gain >= RISE,
            Cause(
                "the task is solved: the remaining responses hardly differ in quality",
                (f"the mean score has risen by {gain:.2g} deviations to {mean:.3g}",),
                (),
                Change("steps", "stop here, or continue with harder prompts"),
            ),
        ),
        (
            is_constant,
            Cause(
                "the scorer returns the same score for every response",
                (f"the scores' standard deviation is 0 at a mean of {mean:.3g}",),
                applicable_texts((are_alike, "the responses themselves are nearly all the same")),
                Change("rewards", "a scorer that distinguishes these responses; try it on two responses by hand"),
            ),
        ),
        (
            is_clipped,
            Cause(
                "reward.clip cuts all scores to the same value",
                ("the scores differ before shaping and are equal after it",),
                (),
                scale_setting(run, "reward.clip", 10),
            ),
        ),
        (
            are_alike,
            Cause(
                "the policy gives nearly the same response every time",
                (f"{last(run['response/distinct']):.0%} of a step's responses are different",),
                (),
                raise_kl(run, 3),
            ),
        ),
        (
            True,
            Cause(
                "the prompts are too easy or too hard for this policy, or the scores are too coarse",
                (
                    f"the mean score is {format_evidence(mean)}, "
                    f"between {format_evidence(lowest)} and {format_evidence(largest)} over the run",
                ),
                (),
                _signal_change(run),
            ),
        ),
    ]
    return [cause for applies, cause in causes if applies]


def _signal_change(run: Run) -> Change:
    """Propose dynamic sampling where some groups still differ and it is off, else other prompts."""
    some_differ = run.has("groups/equal_scores") and last(run["groups/equal_scores"]) < 1.0
    traits = ALGORITHM_TRAITS.get(str(run.setting("algorithm.name", "ppo")))
    if some_differ and traits is not None and traits.compares_groups and not run.setting("rollout.resample_rounds", 0):
        return Change("rollout.resample_rounds", "10 (it is 0): groups of equal scores are replaced by new prompts")
    return Change("prompts.path", "prompts to which the policy gives good and bad responses, or finer scores")


RULES = (
    Rule(
        "prompts-repeated",
        "Each step repeats the same few prompts.",
        "prompts",
        _repeated_levels,
        _repeated_evidence,
        _repeated_causes,
        Documentation(
            measure="different prompts in a step = `prompts/distinct` * `rollout.batch_size`",
            thresholds=(
                Threshold(
                    "different prompts in a step",
                    warning=f"<= {REPEATED:.0%} of the prompts that it could have",
                    critical="1",
                ),
            ),
            note=f"Steps with fewer than {FEW_PROMPTS} prompts are not checked.",
            source=MEASURED_IN_ZOO,
        ),
        patience=2,
    ),
    Rule(
        "no-signal",
        "Responses get equal scores, so there is nothing to learn from.",
        "reward model",
        _signal_levels,
        _signal_evidence,
        _signal_causes,
        Documentation(
            measure=f"`objective/shaped_scores_std` over at least {ENOUGH_RESPONSES} responses and {SHORTEST} steps; "
            f"`groups/equal_scores` over at least {ENOUGH_GROUPS} groups and {SHORTEST} steps",
            thresholds=(
                Threshold("deviation of the scores", notice="0, task solved", critical="0, task not solved"),
                Threshold(
                    "share of groups with equal scores",
                    notice=f">= {EQUAL_NOTICE:.0%}",
                    warning=f">= {EQUAL_WARNING:.0%}, score not up by {RISING:g} sd and {RISING_ERRORS:g} se",
                    critical=f">= {EQUAL_CRITICAL:.0%} after {HOPELESS_AFTER:.0%} of the run, task not solved",
                ),
            ),
            combine="Any row is enough.",
            note=f"A task is solved if the score rose by {RISE:g} sd and {RISE_ERRORS:g} se, or its mean is in the top "
            f"{NEAR_BEST:.0%} of all scores so far while the median is not below the mean. Where scores never "
            "differed, the finding starts at step 1.",
            source="zero-variance groups of GRPO; DAPO (Yu et al. 2025) filters them",
        ),
        patience=3,
        follows=("policy-collapse", "updates-too-large"),
        find_start=_find_signal_start,
    ),
)
