"""Are the scores still what they were? A policy can move them only so far."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from keel.diagnosis.chance import SCORES, prompts_per_step, relative_spread, spread_metric, yardstick
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import CRITICAL, WARNING, Levels, Rule, applicable_texts, change_evidence, levels
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

ENDS = {"mean": "", "std": "_std", "low": "_low", "median": "_median", "high": "_high"}
LASTS = 3  # steps in a row that must differ: one may be chance
FEWEST = 8  # prompts of a step, of which quantiles can be told


Ends = Mapping[str, Series]  # of a step's scores: mean, std, low, median, high


def _jumps(run: Run) -> Holds:
    """Between two steps the scores changed by more than an update can explain, and stayed so. [S]

    Told of a step when it and the two before it all differ from the one before these, and from the middle one of the
    five before these.
    """
    metrics = {name: run[f"{SCORES}{end}"] for name, end in ENDS.items()}
    befores = [{name: shift_steps(x, LASTS) for name, x in metrics.items()}]
    befores.append({name: shift_steps(trailing_median(x, 5), LASTS) for name, x in metrics.items()})
    nats = np.maximum(shift_steps(run["policy/step_kl"] * run["response/length"], LASTS), 0)  # of the update between
    widest = shift_steps(highest(metrics["std"]), LASTS)
    found = (np.cumsum(np.isfinite(metrics["std"])) >= 2 * LASTS) & (prompts_per_step(run) >= FEWEST)
    for ago in range(LASTS):
        now = {name: shift_steps(x, ago) for name, x in metrics.items()}
        found &= _all(_offset(before, now, nats, prompts_per_step(run)) for before in befores) | _all(
            _scale(before, now, nats, prompts_per_step(run), widest) for before in befores
        )
    return found


def _all(each: Iterable[Holds]) -> Holds:
    return np.all(list(each), axis=0)


def _offset(before: Ends, now: Ends, nats: Series, prompts: float) -> Holds:
    """A policy that moved by K nats an answer cannot move a mean by much more than its deviation times sqrt(2 K)
    (Donsker and Varadhan's bound for scores with Gaussian tails); the median must have moved as well, which a rare
    answer that is suddenly paid much cannot do."""
    allowed = before["std"] * (1 + 3 * np.sqrt(2 * nats)) + 5 * np.hypot(before["std"], now["std"]) / np.sqrt(prompts)
    far = _all(at_least(np.abs(now[name] - before[name]), allowed) for name in ("mean", "median"))
    return far & at_most(nats, 2.0) & at_least(before["std"], 1e-6)


def _scale(before: Ends, now: Ends, nats: Series, prompts: float, widest: Series) -> Holds:
    """To stretch a normal distribution r times takes r^2 / 2 - 1 / 2 - ln r nats at least, more than the update had.

    The distance of the 10% and 90% quantiles must have changed 2.5 times and by five standard errors. Scores that are
    all near the best one are close together too, but not near 0.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        stretch = (now["high"] - now["low"]) / (before["high"] - before["low"])
        size = np.abs(np.log(stretch))
        unpaid = at_least(stretch**2 / 2 - 0.5 - np.log(stretch), np.maximum(nats, 1e-12))
    grown = at_least(stretch, 1.0) & at_least(now["std"], 2 * widest)
    shrunk = at_most(stretch, 1.0) & at_most(now["std"], before["std"] / 2.5)
    shrunk &= _all(at_most(np.abs(now[name]), 0.5 * np.abs(before[name]) + now["std"]) for name in ("median", "high"))
    much = at_least(size, max(np.log(2.5), 5 / np.sqrt(prompts))) & np.isfinite(size)
    return (grown | shrunk) & much & unpaid & at_least(before["std"], 1e-6)


def _drifts(run: Run) -> Holds:
    """All answers' scores move in parallel, until the worst are beyond the best of the start: further than the distance
    to the reference can pay for, or than a held-out scorer sees while it puts the answers in the same order as before.
    """
    width = window(run)
    spread = yardstick(run, SCORES)
    now = {end: trailing_mean(run[f"objective/scores_{end}"], width) for end in ("low", "median", "high")}
    before = {end: start_mean(run[f"objective/scores_{end}"], width) for end in now}
    shift = now["median"] - before["median"]
    apart = at_least(now["low"], before["high"]) | at_most(now["high"], before["low"])
    stretch = np.abs((now["high"] - before["high"]) - (now["low"] - before["low"]))
    parallel = (
        apart & at_most(stretch, 0.5 * np.abs(shift)) & at_least(spread, 1e-6) & (prompts_per_step(run) >= FEWEST)
    )
    # An exploit spreads through steps in which answers with and without it stand side by side.
    parallel &= at_most(highest(run[spread_metric(SCORES)]), 2 * start_mean(run[spread_metric(SCORES)], width))
    nats = np.maximum(trailing_mean(run["objective/kl"], width), 0.05)
    unpaid = at_least(np.abs(shift), spread * np.sqrt(2 * nats) + 5 * spread / np.sqrt(prompts_per_step(run)))
    unseen = np.zeros(len(run.steps), dtype=bool)
    for name in run.held_out_scorers():
        own = trailing_mean(run[f"rewards/{name}"], width) - start_mean(run[f"rewards/{name}"], width)
        order = trailing_mean(run[f"agreement/{name}"], width)
        same_order = at_least(order, 0.5 * start_mean(run[f"agreement/{name}"], width)) & at_least(order, 0.25)
        # One that no longer tells apart what the score does has come to its end, and would not rise with it either.
        keeps_up = at_least(relative_spread(run, f"rewards/{name}"), relative_spread(run, SCORES) / 1.5)
        with np.errstate(invalid="ignore", divide="ignore"):
            far = at_least(np.abs(shift / spread - own / yardstick(run, f"rewards/{name}")), 1.5)
        unseen |= far & same_order & keeps_up
    exploited = [held_out_score_fell(run, name) for name in run.held_out_scorers()]
    return parallel & (unpaid | unseen) & ~np.any(exploited, axis=0) if exploited else parallel & unpaid


def _shift(run: Run) -> Levels:
    drifted = trailing_mean(_drifts(run).astype(float), LASTS) == 1
    return levels((drifted & (run.steps >= LASTS), WARNING), (_jumps(run), CRITICAL))


def _shift_evidence(run: Run) -> Sequence[Evidence]:
    places = np.flatnonzero(_jumps(run))
    found = [
        change_evidence(run, "objective/scores_median"),
        change_evidence(run, "objective/scores_std"),
        change_evidence(run, "objective/kl"),
    ]
    if len(places):
        at = max(int(places[0]) - LASTS + 1, 1)
        scores, spread = run["objective/scores"], run["objective/scores_std"]
        text = (
            f"{scores[at - 1]:.3g} +- {spread[at - 1]:.3g} in step {run.steps[at - 1]}, {scores[at]:.3g} +- "
            f"{spread[at]:.3g} in step {run.steps[at]}, while the update moved the policy by "
            f"{run['policy/step_kl'][at - 1] * run['response/length'][at]:.2g} nats an answer"
        )
        found.insert(0, Evidence("objective/scores", text))
    return found


def _shift_causes(run: Run) -> Sequence[Cause]:
    servers = any(source.get("url") for source in run.setting("rewards", []))
    functions = any(source.get("function") for source in run.setting("rewards", []))
    return [
        Cause(
            "the scorer itself changed while the run went on",
            applicable_texts(
                (servers, "it is a server: another model or scale may have been put behind it"),
                (functions, "it is a function: it may count, read a file, or depend on the time"),
            ),
            applicable_texts((not servers and not functions, "the scorers are reward models, whose weights are fixed")),
            Change("rewards", "a scorer that says the same of the same answer on every day; then start again"),
        ),
        Cause(
            "the answers changed all at once, in a way that the first few answers of a step do not show",
            (),
            (),
            Change("", "read the answers of the steps before and after in `keel serve`"),
        ),
    ]


RULES = (
    Rule(
        "reward-shift",
        "The scale or the offset of the scores changed in a way that the policy cannot have caused.",
        "reward model",
        _shift,
        _shift_evidence,
        _shift_causes,
        patience=1,
        follows=("updates-too-large",),
        lasts=True,
        began=lambda run, place: max(place - LASTS + 1, 0),
    ),
)
