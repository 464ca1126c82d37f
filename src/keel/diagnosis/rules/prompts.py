"""Is the run asked enough, and does what it is told tell good answers from bad?"""

from collections.abc import Sequence
from math import ceil

import numpy as np

from keel.diagnosis.chance import SCORES, is_solved, prompts_per_step, responses_per_step, score_rise
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    NOTICE,
    WARNING,
    Levels,
    Rule,
    applicable_texts,
    format_evidence,
    is_now,
    levels,
    raise_kl,
    scale_setting,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import at_least, at_most, highest, last, trailing_mean

FEW = 4  # prompts of a step, below which nothing can be said of their variety
ENOUGH = 256  # answers that are all paid alike: where one in fifty is right, one of so many would be


def _repeated(run: Run) -> Levels:
    distinct = run["prompts/distinct"] * responses_per_step(run)
    enough = np.full(len(run.steps), prompts_per_step(run) >= FEW)
    return levels(
        (enough & at_most(distinct, 0.5 * prompts_per_step(run)), WARNING), (enough & at_most(distinct, 1.5), CRITICAL)
    )


def _repeated_evidence(run: Run) -> Sequence[Evidence]:
    batch = int(run.setting("rollout.batch_size", 64))
    count = round(last(run["prompts/distinct"]) * batch)
    return [Evidence("prompts/distinct", f"{count} different prompts among the {batch} answers of a step")]


def _repeated_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the data set holds few prompts, or the same one many times",
            ("a step draws without putting back, so a prompt comes twice only when the data is used up",),
            (),
            Change("prompts.path", "a file with at least as many different prompts as the whole run asks"),
        )
    ]


def _spread(run: Run) -> Series:
    """The deviation of what a step's answers are paid, 0 where it is nothing beside their mean. [S]"""
    shaped = "objective/shaped_scores" if run.has("objective/shaped_scores_std") else SCORES
    spread, size = run[f"{shaped}_std"], np.nan_to_num(np.abs(run[shaped]))
    return np.where(at_most(spread, 1e-6 * np.maximum(size, 1.0)), 0.0, spread)


def _signal(run: Run) -> Levels:
    """A task that is solved has no signal left either, which is no fault."""
    width = max(3, ceil(ENOUGH / responses_per_step(run)))
    none = at_most(trailing_mean(_spread(run), width), 0.0) & (run.steps >= width)
    equal = trailing_mean(run["groups/equal_scores"], max(3, ceil(ENOUGH / 4 / prompts_per_step(run))))
    learned, (gain, errors) = is_solved(run, width), score_rise(run)
    rising = at_least(gain, 0.1) & at_least(errors, 1.5)
    hopeless = at_least(equal, 0.95) & (run.steps >= 0.2 * run.planned)
    return levels(
        (at_least(equal, 0.7) | none, NOTICE),
        (at_least(equal, 0.85) & ~rising, WARNING),  # too easy from the start is a fault of the prompts
        ((hopeless | none) & ~learned, CRITICAL),
    )


def _signal_began(run: Run, place: int) -> int:
    """The first step, where no answers were ever paid apart: nothing in the run can have caused that."""
    return 0 if at_most(_spread(run)[:place], 0.0).all() else place


def _signal_evidence(run: Run) -> Sequence[Evidence]:
    found = [is_now(run, "objective/shaped_scores_std", "0 means that all answers are paid the same")]
    if run.has("groups/equal_scores"):
        found.insert(0, is_now(run, "groups/equal_scores", "share of prompts whose answers all got the same score"))
    return found


def _signal_causes(run: Run) -> Sequence[Cause]:
    constant = last(run["objective/scores_std"]) <= 1e-6 * max(1.0, abs(last(run["objective/scores"])))
    risen = last(score_rise(run)[0])
    clipped = run.setting("reward.clip") is not None and not constant
    mean, ends = last(run[SCORES]), (-last(highest(-run[SCORES])), last(highest(run[SCORES])))
    alike = last(run["response/distinct"]) < 0.3
    causes = [
        (
            risen >= 0.25,
            Cause(
                "the task is learned: what is left to tell answers apart is little",
                (f"the mean score has risen by {risen:.2g} deviations to {mean:.3g}",),
                (),
                Change("steps", "stop here, or go on with harder prompts"),
            ),
        ),
        (
            constant,
            Cause(
                "the scorer says the same of every answer",
                (f"the scores' standard deviation is 0 at a mean of {mean:.3g}",),
                applicable_texts((alike, "the answers themselves are nearly all the same")),
                Change("rewards", "a scorer that tells these answers apart; try it on two answers by hand"),
            ),
        ),
        (
            clipped,
            Cause(
                "reward.clip cuts all scores to the same value",
                ("the scores differ before shaping, and not after",),
                (),
                scale_setting(run, "reward.clip", 10),
            ),
        ),
        (
            alike,
            Cause(
                "the policy gives nearly the same answer every time",
                (f"{last(run['response/distinct']):.0%} of a step's answers are different",),
                (),
                raise_kl(run, 3),
            ),
        ),
        (
            True,
            Cause(
                "the prompts are too easy or too hard for this policy, or the score is too coarse",
                (
                    f"the mean score is {format_evidence(mean)}, "
                    f"between {format_evidence(ends[0])} and {format_evidence(ends[1])} over the run",
                ),
                (),
                Change("prompts.path", "prompts of which the policy answers some well and some badly, or finer scores"),
            ),
        ),
    ]
    return [cause for applies, cause in causes if applies]


RULES = (
    Rule(
        "prompts-repeated",
        "A step asks the same few prompts again and again: the policy learns them by heart.",
        "prompts",
        _repeated,
        _repeated_evidence,
        _repeated_causes,
        patience=2,
    ),
    Rule(
        "no-signal",
        "The answers are paid alike, so there is nothing to learn from.",
        "reward model",
        _signal,
        _signal_evidence,
        _signal_causes,
        patience=3,
        follows=("policy-collapse", "updates-too-large"),
        began=_signal_began,
    ),
)
