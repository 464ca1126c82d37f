"""Do the scores arrive, mean what they meant before, and point the right way?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.chance import SURE, bounded_error
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    FINE,
    WARNING,
    Levels,
    Rule,
    applicable_texts,
    change_evidence,
    is_failure,
    is_now,
    levels,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import at_least, at_most, highest, trailing_mean

EARLY = 10  # steps in which a policy is still near its start
AT_START = 5  # steps in which it has hardly moved


def _failures(run: Run) -> Levels:
    lost = trailing_mean(run["reward/dropped"], 3)
    found = levels((at_least(lost, 0.02), WARNING), (at_least(lost, 0.25), CRITICAL))
    if is_failure(run, "RewardError"):
        found[-2:] = CRITICAL
    return found


def _failures_evidence(run: Run) -> Sequence[Evidence]:
    ended = is_failure(run, "RewardError")
    words = [Evidence("reward/dropped", f"the run ended with {run.state.what}")] if ended else []
    return [is_now(run, "reward/dropped", "share of answers left out because scoring failed"), *words]


def _failures_causes(run: Run) -> Sequence[Cause]:
    servers = [source["url"] for source in run.setting("rewards", []) if source.get("url")]
    functions = [source["function"] for source in run.setting("rewards", []) if source.get("function")]
    return [
        Cause(
            "the scorer fails on some answers",
            applicable_texts(
                (bool(servers), f"it is asked over the network: {', '.join(servers)}"),
                (bool(functions), f"it is Python code: {', '.join(functions)}"),
            ),
            (),
            Change("rewards", "mend the scorer: faults/ and the run's messages show answers it failed on"),
        )
    ]


def _inverted(run: Run) -> Levels:
    worst = np.zeros(len(run.steps), dtype=bool)
    for name in run.held_out_scorers():
        early, error = (x[:EARLY] for x in score_agreement(run, name))
        counts = np.cumsum(np.isfinite(early))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.nancumsum(early) / counts
            against = at_most(mean, -0.2) & at_most(mean * np.sqrt(counts) / error, -SURE)
        worst[: len(against)] |= against
    return levels((worst, CRITICAL))


def score_agreement(run: Run, name: str) -> tuple[Series, Series]:
    """The rank correlation of the score with another scorer's, and the standard error of one that is 0. [S], [S]"""
    metric = f"agreement/{name}"
    return run[metric], bounded_error(run, metric, 1.0)


def _inverted_evidence(run: Run) -> Sequence[Evidence]:
    found = [
        Evidence(
            f"agreement/{name}",
            f"rank correlation {np.nanmean(run[f'agreement/{name}'][:EARLY]):.2f} in the first steps",
        )
        for name in run.held_out_scorers()
        if run.has(f"agreement/{name}")
    ]
    return [*found, Evidence("objective/scores", f"weights of the scorers: {run.scorer_weights()}")]


def _inverted_causes(run: Run) -> Sequence[Cause]:
    negative = [name for name, weight in run.scorer_weights().items() if weight < 0]
    return [
        Cause(
            "the sign is wrong: good answers are paid less than bad ones",
            applicable_texts(
                (bool(negative), f"the weight of {', '.join(negative)} is negative"),
                (bool(run.held_out_scorers()), "a scorer that is not learned from puts the answers in the other order"),
            ),
            applicable_texts((not negative, "no weight is negative: look into the scorer itself")),
            Change("rewards", "the weight without its sign" if negative else "a scorer in which higher is better"),
        ),
        Cause(
            "the two scorers judge different things",
            (),
            (),
            Change("rewards", "compare both on rankings by people: keel reward reports accuracy on held-out ones"),
        ),
    ]


def _stale(run: Run) -> Levels:
    if run.setting("reward.normalize", "none") == "none":
        return np.full(len(run.steps), FINE, dtype=np.int8)
    early = run.steps <= AT_START
    mean, spread = (trailing_mean(run[f"objective/shaped_scores{end}"], 3) for end in ("", "_std"))
    size = np.abs(mean)
    off = early & (at_least(size, 3.0) | at_least(spread, 4.0) | at_most(spread, 0.25))
    far = early & (at_least(size, 10.0) | at_least(spread, 10.0) | at_most(spread, 0.1))
    raw = trailing_mean(run["objective/scores_std"], 3)
    faint = at_most(spread, 0.02) & at_least(raw, 0.25 * highest(raw))  # not because the scores themselves are alike
    return levels((off | at_least(spread, 10.0) | faint, WARNING), (far, CRITICAL))


def _stale_evidence(run: Run) -> Sequence[Evidence]:
    return [
        change_evidence(run, "objective/shaped_scores", "normalised scores start near 0"),
        change_evidence(run, "objective/shaped_scores_std", "normalised scores start with a deviation near 1"),
    ]


def _stale_causes(run: Run) -> Sequence[Cause]:
    kind = run.setting("reward.normalize")
    return [
        Cause(
            "the statistics belong to other scores: of another reward model, or of before it was changed",
            (f"reward.normalize is {kind}, and the shaped scores are not of mean 0 and deviation 1 at the start",),
            (),
            Change("reward.normalize", "running, or start a new run so that the statistics are measured again"),
        )
    ]


RULES = (
    Rule(
        "reward-failures",
        "Answers are lost because scoring fails.",
        "reward model",
        _failures,
        _failures_evidence,
        _failures_causes,
        patience=2,
    ),
    Rule(
        "reward-inverted",
        "The policy is paid for worse answers.",
        "reward model",
        _inverted,
        _inverted_evidence,
        _inverted_causes,
        patience=2,
        lasts=True,
    ),
    Rule(
        "stale-normaliser",
        "The scores are normalised by statistics that are not theirs.",
        "reward model",
        _stale,
        _stale_evidence,
        _stale_causes,
        patience=2,
        lasts=True,
    ),
)
