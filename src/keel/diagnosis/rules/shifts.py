"""Did the scale or the offset of the scores change? A policy can move its scores only as far as its KL allows."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from keel.diagnosis.chance import SCORES, deviation_unit, prompts_per_step, relative_spread, spread_metric
from keel.diagnosis.evidence import applicable_texts, change_evidence
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
)
from keel.diagnosis.rules.hacking import held_out_score_fell
from keel.run.read.run import Run, Series
from keel.run.read.series import (
    Holds,
    at_least,
    at_most,
    highest,
    shift_steps,
    start_mean,
    trailing_mean,
    trailing_median,
    window,
)

STATISTICS = {"mean": "", "std": "_std", "low": "_low", "median": "_median", "high": "_high"}  # -> end of the metric
LASTING_STEPS = 3  # consecutive steps that must differ: a single one may be chance
FEWEST_PROMPTS = 8  # in a step, below which its quantiles are mostly noise
SURE_ERRORS = 5.0  # standard errors; a jump is looked for at every step of a run
BOUND_FACTOR = 3.0  # on the bound of a mean's change, which holds for Gaussian tails
LARGEST_UPDATE = 2.0  # nats per response: after a larger update the scores may be anywhere
STRETCH = 2.5  # times the distance of the 10% and 90% quantiles
WIDEST = 2.0  # times the largest deviation so far
HALVED = 0.5
PARALLEL = 0.5  # of the shift: the most by which the two outer quantiles may differ in their change
SMALLEST_KL = 0.05  # nats, below which the KL of a window is mostly noise
UNSEEN_RISE = 1.5  # deviations by which the score moved more than a held-out scorer
SAME_ORDER, SAME_ORDER_SHARE = 0.25, 0.5  # rank correlation with a held-out scorer, and of its initial value
KEEPS_UP = 1.5  # times: the most by which a held-out scorer's deviation may have shrunk more than the score's
TINY = 1e-6  # a deviation below this is rounding

Statistics = Mapping[str, Series]  # of a step's scores: mean, std, low, median, high


def _jumps(run: Run) -> Holds:
    """Whether the scores changed between two steps by more than the update can explain, and stayed changed. [S]

    True where each of the last LASTING_STEPS steps differs both from the step before them and from the median of the
    five steps before them.
    """
    statistics = {name: run[f"{SCORES}{end}"] for name, end in STATISTICS.items()}
    earlier = [{name: shift_steps(x, LASTING_STEPS) for name, x in statistics.items()}]
    earlier.append({name: shift_steps(trailing_median(x, 5), LASTING_STEPS) for name, x in statistics.items()})
    # The update between the two steps, in nats per response.
    nats = np.maximum(shift_steps(run["policy/step_kl"] * run["response/length"], LASTING_STEPS), 0)
    widest = shift_steps(highest(statistics["std"]), LASTING_STEPS)
    prompts = prompts_per_step(run)
    jumped = (np.cumsum(np.isfinite(statistics["std"])) >= 2 * LASTING_STEPS) & (prompts >= FEWEST_PROMPTS)
    for ago in range(LASTING_STEPS):
        now = {name: shift_steps(x, ago) for name, x in statistics.items()}
        offset = _all(_has_new_offset(initial, now, nats, prompts) for initial in earlier)
        jumped &= offset | _all(_has_new_scale(initial, now, nats, prompts, widest) for initial in earlier)
    return jumped


def _all(conditions: Iterable[Holds]) -> Holds:
    return np.all(list(conditions), axis=0)


def _has_new_offset(initial: Statistics, now: Statistics, nats: Series, prompts: float) -> Holds:
    """Whether mean and median moved further than an update of `nats` can move them. [S]

    Donsker and Varadhan's bound: for scores with Gaussian tails, a policy that moved by K nats per response changes
    their mean by at most std * sqrt(2 K). The median must move too: a rare response with a suddenly high score, which
    is an exploit and no shift, moves only the mean.
    """
    error = np.hypot(initial["std"], now["std"]) / np.sqrt(prompts)
    allowed = initial["std"] * (1 + BOUND_FACTOR * np.sqrt(2 * nats)) + SURE_ERRORS * error
    far = _all(at_least(np.abs(now[name] - initial[name]), allowed) for name in ("mean", "median"))
    return far & at_most(nats, LARGEST_UPDATE) & at_least(initial["std"], TINY)


def _has_new_scale(initial: Statistics, now: Statistics, nats: Series, prompts: float, widest: Series) -> Holds:
    """Whether the scores spread or shrank more than an update of `nats` can make them. [S]

    To stretch a normal distribution r times takes at least r^2 / 2 - 1 / 2 - ln r nats. Shrunk scores must also be
    nearer to 0: those of a solved task are close together too, near the best score.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        stretch = (now["high"] - now["low"]) / (initial["high"] - initial["low"])
        size = np.abs(np.log(stretch))
        is_unexplained = at_least(stretch**2 / 2 - 0.5 - np.log(stretch), np.maximum(nats, 1e-12))
    grew = at_least(stretch, 1.0) & at_least(now["std"], WIDEST * widest)
    shrank = at_most(stretch, 1.0) & at_most(now["std"], initial["std"] / STRETCH)
    shrank &= _all(
        at_most(np.abs(now[name]), HALVED * np.abs(initial[name]) + now["std"]) for name in ("median", "high")
    )
    is_large = at_least(size, max(np.log(STRETCH), SURE_ERRORS / np.sqrt(prompts))) & np.isfinite(size)
    return (grew | shrank) & is_large & is_unexplained & at_least(initial["std"], TINY)


def _drifts(run: Run) -> Holds:
    """Whether all scores moved in parallel until the worst are above the best of the start, or the reverse. [S]

    The movement must exceed what the KL to the reference explains, or what a held-out scorer shows that still orders
    the responses as it did at the start.
    """
    width, spread = window(run), deviation_unit(run, SCORES)
    ends = ("low", "median", "high")
    now = {end: trailing_mean(run[f"{SCORES}_{end}"], width) for end in ends}
    initial = {end: start_mean(run[f"{SCORES}_{end}"], width) for end in ends}
    shift = now["median"] - initial["median"]
    is_separate = at_least(now["low"], initial["high"]) | at_most(now["high"], initial["low"])
    stretch = np.abs((now["high"] - initial["high"]) - (now["low"] - initial["low"]))
    is_parallel = is_separate & at_most(stretch, PARALLEL * np.abs(shift)) & at_least(spread, TINY)
    is_parallel &= prompts_per_step(run) >= FEWEST_PROMPTS
    # An exploit spreads over several steps in which responses with and without it occur, which widens the scores.
    step_spread = run[spread_metric(SCORES)]
    is_parallel &= at_most(highest(step_spread), WIDEST * start_mean(step_spread, width))
    nats = np.maximum(trailing_mean(run["objective/kl"], width), SMALLEST_KL)
    explained = spread * np.sqrt(2 * nats) + SURE_ERRORS * spread / np.sqrt(prompts_per_step(run))
    is_unexplained = at_least(np.abs(shift), explained)
    held_out = run.held_out_scorers()
    if not held_out:
        return is_parallel & is_unexplained
    is_unseen = np.any([_is_unseen(run, name, shift) for name in held_out], axis=0)
    is_exploit = np.any([held_out_score_fell(run, name) for name in held_out], axis=0)
    return is_parallel & (is_unexplained | is_unseen) & ~is_exploit


def _is_unseen(run: Run, name: str, shift: Series) -> Holds:
    """Whether a held-out scorer moved much less than the score, which moved by `shift`. [S]"""
    width, metric, agreement = window(run), f"rewards/{name}", run[f"agreement/{name}"]
    gain = trailing_mean(run[metric], width) - start_mean(run[metric], width)
    order = trailing_mean(agreement, width)
    keeps_order = at_least(order, SAME_ORDER_SHARE * start_mean(agreement, width)) & at_least(order, SAME_ORDER)
    # A scorer that no longer distinguishes responses is at its maximum, and would not rise with the score either.
    keeps_up = at_least(relative_spread(run, metric), relative_spread(run, SCORES) / KEEPS_UP)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = shift / deviation_unit(run, SCORES) - gain / deviation_unit(run, metric)
        is_far = at_least(np.abs(difference), UNSEEN_RISE)
    return is_far & keeps_order & keeps_up


def _shift_levels(run: Run) -> Levels:
    drifted = trailing_mean(_drifts(run).astype(float), LASTING_STEPS) == 1
    return levels((drifted & (run.steps >= LASTING_STEPS), WARNING), (_jumps(run), CRITICAL))


def _shift_evidence(run: Run) -> Sequence[Evidence]:
    changes = [change_evidence(run, f"{SCORES}_median"), change_evidence(run, f"{SCORES}_std"),
               change_evidence(run, "objective/kl")]  # fmt: skip
    indices = np.flatnonzero(_jumps(run))
    if not len(indices):
        return changes
    at = max(int(indices[0]) - LASTING_STEPS + 1, 1)
    scores, spread = run[SCORES], run[spread_metric(SCORES)]
    nats = run["policy/step_kl"][at - 1] * run["response/length"][at]
    text = (
        f"{scores[at - 1]:.3g} +- {spread[at - 1]:.3g} in step {run.steps[at - 1]}, {scores[at]:.3g} +- "
        f"{spread[at]:.3g} in step {run.steps[at]}, while the update moved the policy by {nats:.2g} nats per response"
    )
    return [Evidence(SCORES, text), *changes]


def _shift_causes(run: Run) -> Sequence[Cause]:
    has_server = any(source.get("url") or source.get("judge") for source in run.setting("rewards", []))
    has_function = any(source.get("function") for source in run.setting("rewards", []))
    return [
        Cause(
            "the scorer changed during the run",
            applicable_texts(
                (has_server, "it is an HTTP service: its model or scale may have changed"),
                (has_function, "it is a function: it may count, read a file, or depend on the time"),
            ),
            applicable_texts(
                (not has_server and not has_function, "the scorers are reward models, whose weights are fixed")
            ),
            Change("rewards", "a scorer that always gives the same response the same score; then start a new run"),
        ),
        Cause(
            "the responses changed suddenly, in a way that policy/step_kl misses: it is measured on a few responses",
            (),
            (),
            Change("", "read the responses of the steps around the change in `keel serve`"),
        ),
    ]


RULES = (
    Rule(
        "reward-shift",
        "The scale or the offset of the scores changed in a way that the policy cannot have caused.",
        "reward model",
        _shift_levels,
        _shift_evidence,
        _shift_causes,
        Documentation(
            measure="mean, median, 10% and 90% quantile of `objective/scores`, against what the policy can cause with "
            "K nats per response, K = `policy/step_kl` * `response/length`",
            thresholds=(
                Threshold(
                    f"offset: change of mean and of median, K <= {LARGEST_UPDATE:g}",
                    critical=f">= sd * (1 + {BOUND_FACTOR:g} * sqrt(2 K)) + {SURE_ERRORS:g} se",
                ),
                Threshold(
                    "scale: r = growth of the distance of the quantiles",
                    critical=f"r or 1 / r >= {STRETCH:g} and {SURE_ERRORS:g} se, r^2 / 2 - 1 / 2 - ln r >= K",
                ),
                Threshold(
                    "drift: parallel shift of the quantiles, low end above the initial high end",
                    warning=f">= sd * sqrt(2 KL) + {SURE_ERRORS:g} sd / sqrt(prompts), or >= {UNSEEN_RISE:g} sd more "
                    "than a held-out scorer",
                ),
            ),
            combine=f"Any row is enough, for {LASTING_STEPS} consecutive steps.",
            note=f"Not checked below {FEWEST_PROMPTS} prompts per step. A growing scale needs {WIDEST:g} times the "
            f"largest deviation; a shrinking one a deviation {STRETCH:g} times smaller and half the median and 90% "
            "quantile, unlike a solved task. A drift needs steps no wider than twice the initial deviation and no "
            f"fallen held-out scorer, unlike an exploit; one that disagrees keeps its order and deviation.",
            source="the bound of Donsker and Varadhan for scores with Gaussian tails; " + MEASURED_IN_ZOO,
        ),
        patience=1,
        follows=("updates-too-large",),
        stays_open=True,
        find_start=lambda run, index: max(index - LASTING_STEPS + 1, 0),
    ),
)
