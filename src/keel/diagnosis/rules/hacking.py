"""Does a rising score still mean better responses?"""

from collections.abc import Mapping, Sequence

import numpy as np

from keel.diagnosis.advice import raise_kl
from keel.diagnosis.chance import (
    RISE,
    SCORES,
    SIGNIFICANT,
    bounded_error,
    fall_from_best,
    held_out_score_rose,
    relative_spread,
    resolution,
    score_rise,
    smooth_score,
    standardized_change,
)
from keel.diagnosis.evidence import applicable_texts, change_evidence, format_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    MEASURED_IN_ZOO,
    WARNING,
    Documentation,
    Levels,
    Rule,
    Threshold,
    levels,
    rule_names,
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

FALL, FALL_ERRORS, BACK = 0.25, 3.0, 0.1  # deviations, standard errors, and deviations at which a fall is over
AGREEMENT = 0.25  # rank correlation at the start
STILL_DIFFER = 0.7  # of the initial deviation
SHARED_GAIN, EXPECTED, SHARED_PART = 0.5, 0.1, 1 / 3  # deviations of the score and the scorer, share of the latter
CLEAR_RISE = 0.1  # deviations
AWAKE = 1.5  # times: the most by which a scorer's deviation may have shrunk more than the score's
DISAGREEMENT = 2.0  # times the start's
SURPRISE, SURPRISE_NATS = 2.0, 0.5  # times the start's, and nats per token
REPETITION = 0.1  # of the 4-grams
OUTSIDE, DISTINCT = 0.5, 0.5  # of the responses, and of the initial share of different ones
WEAK_VOTES = 2  # for a critical finding


def held_out_score_fell(run: Run, name: str) -> Holds:
    """Whether a held-out scorer has fallen from its best, further than the score, and is not back. [S]"""
    fall, errors = fall_beyond_score(run, name)
    return latch(at_least(fall, FALL) & at_least(errors, FALL_ERRORS), at_most(fall, BACK))


def fall_beyond_score(run: Run, name: str) -> tuple[Series, Series]:
    """Return how much further than the score a held-out scorer fell, in deviations and standard errors. [S], [S]

    Only the excess counts: harder prompts, or a policy that breaks, lower both scores.
    """
    fall, errors = fall_from_best(run, f"rewards/{name}")
    excess = fall - np.maximum(_score_fall(run, name), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return excess, np.where(fall > 0, errors * excess / fall, errors)


def _score_fall(run: Run, name: str) -> Series:
    """Return how far the score fell since the held-out scorer was at its best, in deviations of the score. [S]"""
    held_out, score = smooth_score(run, f"rewards/{name}"), smooth_score(run, SCORES)
    is_best = at_least(held_out, highest(held_out))
    score_at_best = carry_forward(np.where(is_best, score, np.nan))
    return standardized_change(run, SCORES, score_at_best - score)[0]


def loses_rank_agreement(run: Run, name: str) -> Holds:
    """Whether the score no longer orders the responses as a held-out scorer does, which it did at the start. [S]

    Among responses that are all good the order is chance. So both must still distinguish responses as at the start, and
    the held-out scorer must not rise.
    """
    width, metric = window(run), f"agreement/{name}"
    initial, now = start_mean(run[metric], width), trailing_mean(run[metric], width)
    error = bounded_error(run, metric, 1.0) * np.sqrt(2 / width)
    is_lost = at_least(initial, AGREEMENT) & at_most(now, 0.0) & at_least(initial - now, SIGNIFICANT * error)
    for spread in ("objective/scores_std", f"spread/{name}"):
        is_lost &= at_least(trailing_mean(run[spread], width), STILL_DIFFER * start_mean(run[spread], width))
    return is_lost & at_most(score_rise(run, f"rewards/{name}")[0], RISE)


def score_gain(run: Run, metric: str) -> Series:
    """Return how far a score is above its first window, in deviations; one outlier is no gain. [S]"""
    return standardized_change(run, metric, smooth_score(run, metric) - start_mean(run[metric], window(run)))[0]


def expected_rise(run: Run, name: str) -> Series:
    """Return how far a held-out scorer should have risen with the score, in its deviations. [S]

    The regression of one on the other: the score's rise times their rank correlation on the first responses, less two
    standard errors of it. Manheim and Garrabrant 2018 describe where it fails.
    """
    width, metric = window(run), f"agreement/{name}"
    correlation = start_mean(run[metric], width) - 2 * bounded_error(run, metric, 1.0) / np.sqrt(width)
    return np.maximum(correlation, 0) * score_gain(run, SCORES)


def gains_alone(run: Run, name: str) -> Holds:
    """Whether a held-out scorer shares at most a third of the expected rise. [S]

    The rise then comes from what the two scorers do not have in common. It does not count where the held-out scorer has
    clearly risen, or is at its maximum and no longer distinguishes these responses.
    """
    metric = f"rewards/{name}"
    gain, errors = score_rise(run, metric)
    largest_gain = score_gain(run, metric) + resolution(run, metric)
    distinguishes = at_least(relative_spread(run, metric), np.fmin(relative_spread(run, SCORES), 1.0) / AWAKE)
    expected = expected_rise(run, name)
    is_alone = at_least(score_gain(run, SCORES), SHARED_GAIN) & at_least(expected, EXPECTED)
    is_alone &= at_most(largest_gain, SHARED_PART * expected)
    return is_alone & distinguishes & ~(at_least(gain, CLEAR_RISE) & at_least(errors, SIGNIFICANT))


def quality_warnings(run: Run) -> Mapping[str, Holds]:
    """Return metric -> where it indicates that responses get no better. Each [S].

    `sharing/NAME` is not a metric; it is `gains_alone` of a held-out scorer.
    """
    width = window(run)
    warnings: dict[str, Holds] = {}
    for name in run.held_out_scorers():
        warnings[f"rewards/{name}"] = held_out_score_fell(run, name)
        warnings[f"agreement/{name}"] = loses_rank_agreement(run, name)
        warnings[f"sharing/{name}"] = gains_alone(run, name) & ~warnings[f"rewards/{name}"]
    for metric in (name for name in run.columns if name.startswith("disagreement/")):
        doubled = at_least(trailing_mean(run[metric], width), DISAGREEMENT * start_mean(run[metric], width))
        warnings[metric] = doubled & at_least(rise(run, metric)[1], SIGNIFICANT)
    surprise = -run["objective/reference_logprob"]
    initial, now = start_mean(surprise, width), trailing_mean(surprise, width)
    warnings["objective/reference_logprob"] = at_least(now, SURPRISE * initial) & at_least(now - initial, SURPRISE_NATS)
    change, errors = rise(run, "response/repetition")
    repeats = at_least(change, REPETITION) & at_least(errors, SIGNIFICANT)
    warnings["response/repetition"] = repeats & ~held_out_score_rose(run)
    distinct = run["response/distinct"]
    warnings["response/distinct"] = at_most(trailing_mean(distinct, width), DISTINCT * start_mean(distinct, width))
    for name in (name for name, weight in run.scorer_weights().items() if weight):
        warnings[f"outside_range/{name}"] = at_least(trailing_mean(run[f"outside_range/{name}"], width), OUTSIDE)
    return warnings


def _hacking_levels(run: Run) -> Levels:
    gain, errors = score_rise(run)
    is_rising = at_least(gain, RISE) & at_least(errors, SIGNIFICANT)
    warnings, never = quality_warnings(run), np.zeros(len(run.steps), dtype=bool)

    def any_warning(*prefixes: str) -> Holds:
        """Scorers of a kind have one vote together."""
        return np.any([never, *(holds for metric, holds in warnings.items() if metric.startswith(prefixes))], axis=0)

    votes = [
        any_warning("agreement/", "sharing/"),
        any_warning("disagreement/"),
        any_warning("objective/"),
        any_warning("response/repetition"),
        # Alone, each of the two has a rule already: reward-out-of-range and policy-collapse.
        any_warning("outside_range/") & any_warning("response/distinct"),
    ]
    count = np.sum(votes, axis=0)
    is_critical = (count >= WEAK_VOTES) | any_warning("rewards/")
    return levels((is_rising & (count >= 1), WARNING), (is_rising & is_critical, CRITICAL))


def _current_warnings(run: Run) -> list[str]:
    return [metric for metric, holds in quality_warnings(run).items() if holds[-1]]


def _hacking_evidence(run: Run) -> Sequence[Evidence]:
    warnings = [_warning_evidence(run, metric) for metric in _current_warnings(run)]
    return [change_evidence(run, "objective/scores"), *warnings]


def _warning_evidence(run: Run, metric: str) -> Evidence:
    kind, _, name = metric.partition("/")
    if kind == "sharing":
        gain = format_evidence(last(score_gain(run, f"rewards/{name}")))
        expected = format_evidence(last(expected_rise(run, name)))
        text = f"up by {gain} of its deviation; its initial agreement with the score predicts {expected}"
        return Evidence(f"rewards/{name}", text)
    if kind != "rewards":
        return change_evidence(run, metric)
    smooth = trailing_mean(run[metric], window(run))
    best = int(np.nanargmax(smooth))
    return Evidence(metric, f"{smooth[best]:.3g} at its best, in step {run.steps[best]}, {last(smooth):.3g} now")


def _hacking_causes(run: Run) -> Sequence[Cause]:
    warnings = set(_current_warnings(run))
    kinds = {metric.partition("/")[0] for metric in warnings}
    kl_coef, kl = last(run["objective/kl_coef"]), last(run["objective/kl"])
    outside = [metric for metric in warnings if metric.startswith(("outside_range/", "disagreement/"))]
    has_length = abs(last(trailing_mean(run["response/length_correlation"], window(run)))) > 0.4
    has_range = any(run.has(f"outside_range/{name}") for name, weight in run.scorer_weights().items() if weight)
    weak_models = [
        f"{name} has a held-out accuracy of {metrics['accuracy']:.0%}, length alone {metrics['length_accuracy']:.0%}"
        for name, metrics in run.reward_models().items()
        if metrics["accuracy"] < metrics["length_accuracy"] + 0.05 or metrics["accuracy"] < 0.6
    ]
    return [
        Cause(
            "the KL penalty is too weak: the policy has left the responses that the reward model was trained on",
            applicable_texts(
                (kl_coef == 0, "kl_coef is 0"),
                (not run.has("objective/kl"), "there is no reference model"),
                (kl > 10 and kl_coef > 0, f"the KL is {kl:.3g} nats per response"),
                ("objective/reference_logprob" in warnings, "the reference finds the responses unlikely"),
            ),
            applicable_texts((kl < 10 and kl_coef > 0, f"the KL is only {kl:.3g} nats per response")),
            raise_kl(run, 3),
        ),
        Cause(
            "the reward model is wrong about responses of this kind",
            applicable_texts(
                (bool(outside), f"{', '.join(sorted(outside))}: beyond the data that it was trained on"),
                ("rewards" in kinds, "a held-out scorer falls"),
                ("sharing" in kinds, "a held-out scorer does not rise with the score"),
                *((True, text) for text in weak_models),
            ),
            applicable_texts((has_range and not outside, "its scores are in the range of its held-out responses")),
            Change("rewards", "an ensemble with combine: lower, trained also on rankings of this run's responses"),
        ),
        Cause(
            "the score rewards something easy, such as length or a phrase",
            applicable_texts(
                (has_length, "score and length are correlated within a step"),
                ("response/repetition" in warnings, "responses repeat themselves"),
                ("response/distinct" in warnings, "different prompts get the same response"),
            ),
            (),
            Change("rewards", "read the best responses in `keel report`, and rank them against the first ones"),
        ),
    ]


RULES = (
    Rule(
        "reward-hacking",
        "The score rises while other evidence shows no better responses.",
        "reward model",
        _hacking_levels,
        _hacking_evidence,
        _hacking_causes,
        Documentation(
            measure=f"rise of `objective/scores`, at least {RISE:g} sd and {SIGNIFICANT:g} se, together with votes "
            "against it. Expected rise = (r - 2 se) * rise of the score, r = `agreement/NAME` at the start",
            thresholds=(
                Threshold(
                    "fall of a held-out scorer from its best, beyond that of the score",
                    critical=f">= {FALL:g} sd and {FALL_ERRORS:g} se",
                ),
                Threshold(
                    "1a. `agreement/NAME`, at the start and now",
                    warning=f">= {AGREEMENT:g}, then <= 0; down by {SIGNIFICANT:g} se",
                ),
                Threshold(
                    "1b. rise of a held-out scorer + 2 se",
                    warning="<= a third of the expected rise",
                ),
                Threshold("2. `disagreement/NAME` of an ensemble", warning=f">= {DISAGREEMENT:g} times the start's"),
                Threshold(
                    "3. -`objective/reference_logprob`",
                    warning=f">= {SURPRISE:g} times the start's, and {SURPRISE_NATS:g} nats per token more",
                ),
                Threshold("4. rise of `response/repetition`", warning=f">= {REPETITION:.0%} of the 4-grams"),
                Threshold(
                    "5. `outside_range/NAME`, and `response/distinct`",
                    warning=f">= {OUTSIDE:.0%}, and <= {DISTINCT:.0%} of the start's",
                ),
            ),
            combine=f"One row is enough; {WEAK_VOTES} different numbers are critical.",
            note=f"A fall is over within {BACK:g} sd of the best. Agreement counts only while both scorers keep "
            f"{STILL_DIFFER:.0%} of their initial deviation and the held-out one has not risen. Row 1b needs a score "
            f"{SHARED_GAIN:g} sd up, {EXPECTED:g} sd expected, and a held-out scorer that distinguishes responses; "
            "it exaggerates where r comes from easy prompts. Repetition does not count while a held-out scorer is "
            "above its start.",
            source="ensembles: Coste et al. 2023; expected rise: Manheim and Garrabrant 2018; " + MEASURED_IN_ZOO,
        ),
        patience=2,
        follows=rule_names(
            "updates-too-large reward-inverted reward-shift length-exploitation prompts-repeated "
            "missing-ends entropy-runaway sampler-mismatch"
        ),
    ),
)
