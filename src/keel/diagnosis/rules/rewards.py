"""Do the scores arrive, do they keep their meaning, and does a higher score mean a better response?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.chance import SIGNIFICANT, bounded_error
from keel.diagnosis.evidence import applicable_texts, change_evidence, current_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    FINE,
    MEASURED_IN_ZOO,
    WARNING,
    Bounds,
    Documentation,
    Levels,
    Rule,
    Threshold,
    is_failure,
    levels,
    levels_at_least,
    threshold,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import at_least, at_most, highest, trailing_mean

MEAN_STEPS = 3
DROPPED = Bounds(warning=0.02, critical=0.25)  # of the responses
EARLY_STEPS = 10  # in which a policy is still near its start
INVERTED = -0.2  # rank correlation
NORMALISED_STEPS = 5  # in which the policy has hardly moved, so the scores have their initial mean and deviation
SHAPED_MEAN = Bounds(warning=3.0, critical=10.0)  # of scores that should have mean 0
SHAPED_HIGH = Bounds(warning=4.0, critical=10.0)  # of their deviation, which should be 1
SHAPED_LOW = Bounds(warning=0.25, critical=0.1)
LATE_HIGH, LATE_LOW = 10.0, 0.02  # the same in any step: a policy that learns moves the statistics
STILL_DIFFER = 0.25  # of the largest deviation of the raw scores so far


def _failures_levels(run: Run) -> Levels:
    result = levels_at_least(trailing_mean(run["reward/dropped"], MEAN_STEPS), DROPPED)
    if is_failure(run, "RewardError"):
        result[-2:] = CRITICAL  # as many steps as the patience of the rule
    return result


def _failures_evidence(run: Run) -> Sequence[Evidence]:
    failed = is_failure(run, "RewardError")
    error = [Evidence("reward/dropped", f"the run ended with {run.state.what}")] if failed else []
    return [current_evidence(run, "reward/dropped", "share of responses dropped because scoring failed"), *error]


def _failures_causes(run: Run) -> Sequence[Cause]:
    servers = [source["url"] for source in run.setting("rewards", []) if source.get("url")]
    servers += [source["judge"]["url"] for source in run.setting("rewards", []) if source.get("judge")]
    functions = [source["function"] for source in run.setting("rewards", []) if source.get("function")]
    return [
        Cause(
            "the scorer fails on some responses",
            applicable_texts(
                (bool(servers), f"it is an HTTP service: {', '.join(servers)}"),
                (bool(functions), f"it is Python code: {', '.join(functions)}"),
            ),
            (),
            Change("rewards", "fix the scorer: faults/ and the run's messages show responses on which it failed"),
        )
    ]


def _inverted_levels(run: Run) -> Levels:
    inverted = np.zeros(len(run.steps), dtype=bool)
    for name in run.held_out_scorers():
        early, error = (x[:EARLY_STEPS] for x in score_agreement(run, name))
        counts = np.cumsum(np.isfinite(early))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.nancumsum(early) / counts
            is_negative = at_most(mean, INVERTED) & at_most(mean * np.sqrt(counts) / error, -SIGNIFICANT)
        inverted[: len(is_negative)] |= is_negative
    return levels((inverted, CRITICAL))


def score_agreement(run: Run, name: str) -> tuple[Series, Series]:
    """Return the rank correlation of the score with another scorer, and the standard error of a zero one. [S], [S]"""
    metric = f"agreement/{name}"
    return run[metric], bounded_error(run, metric, 1.0)


def _inverted_evidence(run: Run) -> Sequence[Evidence]:
    agreements = [
        Evidence(
            f"agreement/{name}",
            f"rank correlation {np.nanmean(run[f'agreement/{name}'][:EARLY_STEPS]):.2f} in the first steps",
        )
        for name in run.held_out_scorers()
        if run.has(f"agreement/{name}")
    ]
    return [*agreements, Evidence("objective/scores", f"weights of the scorers: {run.scorer_weights()}")]


def _inverted_causes(run: Run) -> Sequence[Cause]:
    negative = [name for name, weight in run.scorer_weights().items() if weight < 0]
    return [
        Cause(
            "the sign is wrong: better responses get lower scores",
            applicable_texts(
                (bool(negative), f"the weight of {', '.join(negative)} is negative"),
                (bool(run.held_out_scorers()), "a held-out scorer orders the responses the other way"),
            ),
            applicable_texts((not negative, "no weight is negative: check the scorer itself")),
            Change("rewards", "the weight without its sign" if negative else "a scorer in which higher is better"),
        ),
        Cause(
            "the two scorers measure different things",
            (),
            (),
            Change("rewards", "compare both on human rankings: keel reward reports the held-out accuracy"),
        ),
    ]


def _stale_levels(run: Run) -> Levels:
    if run.setting("reward.normalize", "none") == "none":
        return np.full(len(run.steps), FINE, dtype=np.int8)
    mean, spread = (trailing_mean(run[f"objective/shaped_scores{end}"], MEAN_STEPS) for end in ("", "_std"))
    is_early = run.steps <= NORMALISED_STEPS
    off, far = (
        is_early & (at_least(np.abs(mean), size) | at_least(spread, high) | at_most(spread, low))
        for size, high, low in (
            (SHAPED_MEAN.warning, SHAPED_HIGH.warning, SHAPED_LOW.warning),
            (SHAPED_MEAN.critical, SHAPED_HIGH.critical, SHAPED_LOW.critical),
        )
    )
    raw = trailing_mean(run["objective/scores_std"], MEAN_STEPS)
    # A small deviation is no fault where the raw scores are alike too, as when a task is solved.
    faint = at_most(spread, LATE_LOW) & at_least(raw, STILL_DIFFER * highest(raw))
    return levels((off | at_least(spread, LATE_HIGH) | faint, WARNING), (far, CRITICAL))


def _stale_evidence(run: Run) -> Sequence[Evidence]:
    return [
        change_evidence(run, "objective/shaped_scores", "normalised scores start near 0"),
        change_evidence(run, "objective/shaped_scores_std", "normalised scores start with a deviation near 1"),
    ]


def _stale_causes(run: Run) -> Sequence[Cause]:
    kind = run.setting("reward.normalize")
    return [
        Cause(
            "the statistics are those of other scores: of another reward model, or of an earlier version of it",
            (f"reward.normalize is {kind}, and the shaped scores do not start with mean 0 and deviation 1",),
            (),
            Change("reward.normalize", "running, or start a new run, which measures the statistics again"),
        )
    ]


RULES = (
    Rule(
        "reward-failures",
        "Responses are lost because scoring fails.",
        "reward model",
        _failures_levels,
        _failures_evidence,
        _failures_causes,
        Documentation(
            measure=f"mean of `reward/dropped` over {MEAN_STEPS} steps",
            thresholds=(
                threshold("share of responses dropped", DROPPED, ">= {:.0%}"),
                Threshold("end of the run", critical="a `RewardError`"),
            ),
            combine="Any row is enough.",
            source=MEASURED_IN_ZOO,
        ),
        patience=2,
    ),
    Rule(
        "reward-inverted",
        "Worse responses get higher scores.",
        "reward model",
        _inverted_levels,
        _inverted_evidence,
        _inverted_causes,
        Documentation(
            measure=f"mean of `agreement/NAME` over the first {EARLY_STEPS} steps, the rank correlation of the score "
            "with a held-out scorer",
            thresholds=(
                Threshold("mean rank correlation", critical=f"<= {INVERTED:g} and <= -{SIGNIFICANT:g} standard errors"),
            ),
            note="A negative weight alone is not reported: it is right for a scorer that counts mistakes.",
            source=MEASURED_IN_ZOO,
        ),
        patience=2,
        stays_open=True,
    ),
    Rule(
        "stale-normaliser",
        "The scores are normalised with statistics that do not fit them.",
        "reward model",
        _stale_levels,
        _stale_evidence,
        _stale_causes,
        Documentation(
            measure=f"`objective/shaped_scores` and `objective/shaped_scores_std`, means of {MEAN_STEPS} steps, which "
            "should start at 0 and 1",
            thresholds=(
                threshold(f"abs(mean) in the first {NORMALISED_STEPS} steps", SHAPED_MEAN),
                threshold(f"deviation in the first {NORMALISED_STEPS} steps", SHAPED_HIGH),
                threshold(f"deviation in the first {NORMALISED_STEPS} steps", SHAPED_LOW, "<= {:g}"),
                Threshold("deviation in any step", warning=f">= {LATE_HIGH:g}"),
                Threshold("deviation in any step, while the raw scores differ", warning=f"<= {LATE_LOW:g}"),
            ),
            combine="Any row is enough.",
            note="Only with `reward.normalize`. Later means are not checked: a policy that learns moves them. Raw "
            f"scores differ while `objective/scores_std` is at least {STILL_DIFFER:.0%} of its largest value.",
            source=MEASURED_IN_ZOO,
        ),
        patience=2,
        stays_open=True,
    ),
)
