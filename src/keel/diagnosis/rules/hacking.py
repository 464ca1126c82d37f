"""Does a rising score still mean better answers?"""

from collections.abc import Mapping, Sequence

import numpy as np

from keel.diagnosis.chance import (
    SCORES,
    SURE,
    bounded_error,
    fall_from_best,
    held_out_score_rose,
    relative_spread,
    resolution,
    score_rise,
    standardized_change,
    steady,
)
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    WARNING,
    Levels,
    Rule,
    applicable_texts,
    change_evidence,
    format_evidence,
    levels,
    names,
    raise_kl,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import (
    Holds,
    at_least,
    at_most,
    carry_forward,
    highest,
    last,
    latch,
    rise,
    start_mean,
    trailing_mean,
    window,
)


def held_out_score_fell(run: Run, name: str) -> Holds:
    """Whether a held-out scorer has fallen from its best alone, and is not back. [S]"""
    fall, errors = fall_alone(run, name)
    return latch(at_least(fall, 0.25) & at_least(errors, 3.0), at_most(fall, 0.1))


def fall_alone(run: Run, name: str) -> tuple[Series, Series]:
    """How much further than the score itself a held-out scorer is below its best, in its deviations and in standard
    errors: harder prompts, or a policy that breaks, lower both. [S], [S]"""
    fall, errors = fall_from_best(run, f"rewards/{name}")
    alone = fall - np.maximum(_own_fall(run, name), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return alone, np.where(fall > 0, errors * alone / fall, errors)


def _own_fall(run: Run, name: str) -> Series:
    """How far the score is below where it was when the held-out scorer was at its best, in its deviations. [S]"""
    theirs, own = steady(run, f"rewards/{name}"), steady(run, SCORES)
    is_best = at_least(theirs, highest(theirs))
    at_best = carry_forward(np.where(is_best, own, np.nan))
    return standardized_change(run, SCORES, at_best - own)[0]


def loses_rank_agreement(run: Run, name: str) -> Holds:
    """Whether the score no longer puts the answers in the order of a held-out scorer, as it did at the start. [S]

    Among answers that are all good the order is chance, so this says something only while both tell answers apart as
    before, and the other one does not rise.
    """
    width, metric = window(run), f"agreement/{name}"
    before, now = start_mean(run[metric], width), trailing_mean(run[metric], width)
    error = bounded_error(run, metric, 1.0) * np.sqrt(2 / width)
    lost = at_least(before, 0.25) & at_most(now, 0.0) & at_least(before - now, SURE * error)
    for spread in ("objective/scores_std", f"spread/{name}"):
        lost &= at_least(trailing_mean(run[spread], width), 0.7 * start_mean(run[spread], width))
    return lost & at_most(score_rise(run, f"rewards/{name}")[0], 0.25)


def score_gain(run: Run, metric: str) -> Series:
    """How far a score is above its first window, in deviations; one wild answer is no rise. [S]"""
    return standardized_change(run, metric, steady(run, metric) - start_mean(run[metric], window(run)))[0]


def expected_rise(run: Run, name: str) -> Series:
    """How far a held-out scorer should have risen with the score, in its deviations: the score's own rise times their
    rank correlation over the first answers, less two standard errors of it (the regression of the one on the other;
    Manheim and Garrabrant 2018 on where it fails). [S]"""
    width, metric = window(run), f"agreement/{name}"
    order = start_mean(run[metric], width) - 2 * bounded_error(run, metric, 1.0) / np.sqrt(width)
    return np.maximum(order, 0) * score_gain(run, SCORES)


def gains_alone(run: Run, name: str) -> Holds:
    """Whether a held-out scorer shares at most a third of the score's rise: what is paid for is then not what the two
    have in common. Not where it has clearly risen, or come to its end and tells these answers apart no longer. [S]"""
    metric = f"rewards/{name}"
    theirs, (gain, errors) = score_gain(run, metric) + resolution(run, metric), score_rise(run, metric)
    awake = at_least(relative_spread(run, metric), np.fmin(relative_spread(run, SCORES), 1.0) / 1.5)
    expected = expected_rise(run, name)
    alone = at_least(score_gain(run, SCORES), 0.5) & at_least(expected, 0.1) & at_most(theirs, expected / 3)
    return alone & awake & ~(at_least(gain, 0.1) & at_least(errors, SURE))


def second_opinions(run: Run) -> Mapping[str, Holds]:
    """Figure -> where it says that the answers get no better while the score says better. Each [S]."""
    width = window(run)
    found: dict[str, Holds] = {}
    for name in run.held_out_scorers():
        found[f"rewards/{name}"] = held_out_score_fell(run, name)
        found[f"agreement/{name}"] = loses_rank_agreement(run, name)
        found[f"sharing/{name}"] = gains_alone(run, name) & ~found[f"rewards/{name}"]
    for metric in (name for name in run.columns if name.startswith("disagreement/")):
        doubled = at_least(trailing_mean(run[metric], width), 2 * start_mean(run[metric], width))
        found[metric] = doubled & at_least(rise(run, metric)[1], SURE)
    surprise = -run["objective/reference_logprob"]
    before, now = start_mean(surprise, width), trailing_mean(surprise, width)
    found["objective/reference_logprob"] = at_least(now, 2.0 * before) & at_least(now - before, 0.5)
    repeated = rise(run, "response/repetition")
    found["response/repetition"] = at_least(repeated[0], 0.1) & at_least(repeated[1], SURE) & ~held_out_score_rose(run)
    distinct = run["response/distinct"]
    found["response/distinct"] = at_most(trailing_mean(distinct, width), 0.5 * start_mean(distinct, width))
    for name in (name for name, weight in run.scorer_weights().items() if weight):
        found[f"outside_range/{name}"] = at_least(trailing_mean(run[f"outside_range/{name}"], width), 0.5)
    return found


def _hacking(run: Run) -> Levels:
    gain, errors = score_rise(run)
    rising = at_least(gain, 0.25) & at_least(errors, SURE)
    opinions, nobody = second_opinions(run), np.zeros(len(run.steps), dtype=bool)

    def any_of(*starts: str) -> Holds:
        """Scorers of a kind have one vote."""
        return np.any([nobody, *(holds for metric, holds in opinions.items() if metric.startswith(starts))], axis=0)

    # Alone the last two are a reward model out of its range, and a collapse.
    votes = [
        any_of("agreement/", "sharing/"),
        any_of("disagreement/"),
        any_of("objective/"),
        any_of("response/repetition"),
        any_of("outside_range/") & any_of("response/distinct"),
    ]
    count = np.sum(votes, axis=0)
    return levels((rising & (count >= 1), WARNING), (rising & ((count >= 2) | any_of("rewards/")), CRITICAL))


def _hacking_evidence(run: Run) -> Sequence[Evidence]:
    speaks = [metric for metric, holds in second_opinions(run).items() if holds[-1]]
    return [change_evidence(run, "objective/scores"), *(_opinion(run, metric) for metric in speaks)]


def _opinion(run: Run, metric: str) -> Evidence:
    kind, _, name = metric.partition("/")
    if kind == "sharing":
        gain, expected = (
            format_evidence(last(part)) for part in (score_gain(run, f"rewards/{name}"), expected_rise(run, name))
        )
        says = f"risen by {gain} of its deviation; by how alike they were at first, {expected} goes with the score"
        return Evidence(f"rewards/{name}", says)
    if kind != "rewards":
        return change_evidence(run, metric)
    smooth = trailing_mean(run[metric], window(run))
    best = int(np.nanargmax(smooth))
    return Evidence(metric, f"{smooth[best]:.3g} at its best, in step {run.steps[best]}, {last(smooth):.3g} now")


def _hacking_causes(run: Run) -> Sequence[Cause]:
    speaks = {metric for metric, holds in second_opinions(run).items() if holds[-1]}
    kl_coef, kl = last(run["objective/kl_coef"]), last(run["objective/kl"])
    outside = [metric for metric in speaks if metric.startswith(("outside_range/", "disagreement/"))]
    length = abs(last(trailing_mean(run["response/length_correlation"], window(run)))) > 0.4
    known = any(run.has(f"outside_range/{name}") for name, weight in run.scorer_weights().items() if weight)
    weak = [
        f"{name} was right on {metrics['accuracy']:.0%} of its held-out comparisons, length alone on "
        f"{metrics['length_accuracy']:.0%}"
        for name, metrics in run.reward_models().items()
        if metrics["accuracy"] < metrics["length_accuracy"] + 0.05 or metrics["accuracy"] < 0.6
    ]
    return [
        Cause(
            "the KL holds the policy too weakly: it has left the answers that the reward model knows",
            applicable_texts(
                (kl_coef == 0, "kl_coef is 0"),
                (not run.has("objective/kl"), "there is no reference to hold it"),
                (kl > 10 and kl_coef > 0, f"the KL is {kl:.3g} nats an answer"),
                ("objective/reference_logprob" in speaks, "the reference finds the answers odd"),
            ),
            applicable_texts((kl < 10 and kl_coef > 0, f"the KL is only {kl:.3g} nats an answer")),
            raise_kl(run, 3),
        ),
        Cause(
            "the reward model is wrong about answers of this kind",
            applicable_texts(
                (bool(outside), f"{', '.join(sorted(outside))} say that it is beyond what it was trained on"),
                (any(metric.startswith("rewards/") for metric in speaks), "a scorer that is not learned from falls"),
                (
                    any(metric.startswith("sharing/") for metric in speaks),
                    "a scorer that is not learned from does not rise with the score",
                ),
                *((True, text) for text in weak),
            ),
            applicable_texts((known and not outside, "its scores are within those of its own held-out answers")),
            Change("rewards", "an ensemble with combine: lower, trained also on rankings of this run's answers"),
        ),
        Cause(
            "the score pays for something easy, such as length or a phrase",
            applicable_texts(
                (length, "score and length go together within a step"),
                ("response/repetition" in speaks, "answers repeat themselves"),
                ("response/distinct" in speaks, "different prompts get the same answer"),
            ),
            (),
            Change("rewards", "read the best answers in `keel report`, and rank them against the first ones"),
        ),
    ]


RULES = (
    Rule(
        "reward-hacking",
        "The score rises while a second opinion says that the answers get no better.",
        "reward model",
        _hacking,
        _hacking_evidence,
        _hacking_causes,
        patience=2,
        follows=names(
            "updates-too-large reward-inverted reward-shift length-exploitation prompts-repeated "
            "missing-ends entropy-runaway sampler-mismatch"
        ),
    ),
)
