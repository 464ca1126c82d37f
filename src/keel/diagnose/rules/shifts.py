"""Are the scores still what they were? A policy can move them only so far."""

from collections.abc import Sequence

import numpy as np

from keel.diagnose.findings import Cause, Change, Evidence
from keel.diagnose.rule import CRITICAL, WARNING, Levels, Rule, levels, moved, reasons
from keel.diagnose.rules.hacking import fallen
from keel.diagnose.run import Run
from keel.diagnose.series import Holds, at_least, at_most, highest, lagged, start_of, trailing_mean, window


def _jumps(run: Run) -> Holds:
    """The scores changed from one step to the next by more than the policy's own step can explain.

    A policy that moved by K nats per answer cannot move a mean by much more than its deviation times sqrt(2 K)
    (Donsker and Varadhan's bound for scores with Gaussian tails); median and quantiles must have moved as well, which
    a rare answer that is suddenly paid much cannot do.
    """
    batch = float(run.setting("rollout.batch_size", 64))
    spread, before = run["objective/scores_std"], lagged(run["objective/scores_std"], 1)
    nats = lagged(run["policy/step_kl"], 1) * run["response/length"]
    error = np.hypot(spread, before) / np.sqrt(batch)
    allowed = 3 * before * np.sqrt(2 * np.maximum(nats, 0)) + 5 * error + before
    shifts = [run[f"objective/scores{end}"] - lagged(run[f"objective/scores{end}"], 1) for end in ("", "_median")]
    width = run["objective/scores_high"] - run["objective/scores_low"]
    with np.errstate(invalid="ignore", divide="ignore"):
        widest = lagged(highest(spread), 1)
        stretch, widened = np.log(width / lagged(width, 1)), np.log(spread / before)
    grown = at_least(stretch, np.log(2.5)) & at_least(widened, np.log(2.0)) & at_least(spread, 2 * widest)
    middle, high = (np.abs(run[f"objective/scores_{end}"]) for end in ("median", "high"))
    # Scores that are all near the best one are close together too, but not near 0.
    shrunk = (
        at_most(stretch, -np.log(2.5)) & at_most(middle, 0.5 * lagged(middle, 1)) & at_most(high, 0.5 * lagged(high, 1))
    )
    moved_far = at_least(np.abs(shifts[0]), allowed) & at_least(np.abs(shifts[1]), allowed)
    return (moved_far | grown | shrunk) & at_most(nats, 2.0) & at_least(before, 1e-6) & np.isfinite(stretch)


def _drifts(run: Run) -> Holds:
    """All answers' scores move in parallel, until the worst are beyond the best of the start: further than the distance
    to the reference can pay for, or than a held-out scorer sees while it puts the answers in the same order as before.
    """
    width = window(run)
    batch = float(run.setting("rollout.batch_size", 64))
    spread = start_of(run["objective/scores_std"], width)
    now = {end: trailing_mean(run[f"objective/scores_{end}"], width) for end in ("low", "median", "high")}
    before = {end: start_of(run[f"objective/scores_{end}"], width) for end in now}
    shift = now["median"] - before["median"]
    apart = at_least(now["low"], before["high"]) | at_most(now["high"], before["low"])
    stretch = np.abs((now["high"] - before["high"]) - (now["low"] - before["low"]))
    parallel = apart & at_most(stretch, 0.5 * np.abs(shift)) & at_least(spread, 1e-6)
    nats = np.maximum(trailing_mean(run["objective/kl"], width), 0.05)
    unpaid = at_least(np.abs(shift), spread * np.sqrt(2 * nats) + 5 * spread / np.sqrt(batch))
    unseen = np.zeros(len(run.steps), dtype=bool)
    for name in run.held_out_scorers():
        own = trailing_mean(run[f"rewards/{name}"], width) - start_of(run[f"rewards/{name}"], width)
        order = trailing_mean(run[f"agreement/{name}"], width)
        same_order = at_least(order, 0.5 * start_of(run[f"agreement/{name}"], width)) & at_least(order, 0.25)
        with np.errstate(invalid="ignore", divide="ignore"):
            unseen |= at_least(np.abs(shift / spread - own / start_of(run[f"spread/{name}"], width)), 1.5) & same_order
    exploited = [fallen(run, name) for name in run.held_out_scorers()]
    return parallel & (unpaid | unseen) & ~np.any(exploited, axis=0) if exploited else parallel & unpaid


def _shift(run: Run) -> Levels:
    return levels((_drifts(run), WARNING), (_jumps(run), CRITICAL))


def _shift_evidence(run: Run) -> Sequence[Evidence]:
    places = np.flatnonzero(_jumps(run))
    found = [moved(run, "objective/scores_median"), moved(run, "objective/scores_std"), moved(run, "objective/kl")]
    if len(places):
        at = int(places[0])
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
            reasons(
                (servers, "it is a server: another model or scale may have been put behind it"),
                (functions, "it is a function: it may count, read a file, or depend on the time"),
            ),
            reasons((not servers and not functions, "the scorers are reward models, whose weights are fixed")),
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
    ),
)
