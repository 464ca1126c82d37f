"""The supervised stages: keel sft, keel reward and keel dpo."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from keel.diagnosis.advice import scale_setting
from keel.diagnosis.evidence import applicable_texts
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
    is_failure,
    levels,
    levels_at_least,
    threshold,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import Holds, at_most, carry_forward, first, last

FEWEST_LOSSES = 10  # with fewer, a trend cannot be separated from noise
LOSS_CHANGE, ACCURACY_CHANGE, TREND = 0.01, 0.02, 0.02  # of the first held-out loss; accuracy; of the mean loss
OVERFITTED = Bounds(warning=0.1, critical=0.5)  # of what the held-out loss had gained
SMALLEST_GAIN = 0.01  # of the first held-out loss
OVER_LENGTH, OVER_CHANCE = 0.02, 0.52  # accuracy above that of length alone, and accuracy
SKIPPED = Bounds(warning=0.05, critical=0.3)  # of the updates
LESS_LIKELY = Bounds(warning=5.0, critical=20.0)  # nats per response


def _metric(run: Run, name: str) -> Series:
    return run[f"{run.stage}/{name}"]


def _has_not_moved(run: Run) -> NDArray[np.bool_]:
    """Whether nothing was learned so far: held-out metrics and the trend of the loss are within their bounds. [S]"""
    held_out, accuracy = _metric(run, "eval_loss"), _metric(run, "eval_accuracy")
    loss_change = np.fmax.accumulate(np.abs(held_out - first(held_out))) / abs(first(held_out))
    accuracy_change = np.fmax.accumulate(np.abs(accuracy - first(accuracy)))
    trend, count = _trend(_metric(run, "loss"))
    with np.errstate(invalid="ignore"):
        moved = (loss_change > LOSS_CHANGE) | (accuracy_change > ACCURACY_CHANGE) | (trend > TREND)
    return (count >= FEWEST_LOSSES) & ~moved


def _trend(x: Series) -> tuple[Series, Series]:
    """Return the relative difference between the halves of a metric so far, and the number of values. [S], [S]

    The difference of the means of the two halves, less two standard errors, as a share of the mean.
    """
    finite = np.isfinite(x)
    values = np.where(finite, x, 0.0)
    sums, squares, count = np.cumsum(values), np.cumsum(values**2), np.cumsum(finite)
    halves = [int(np.searchsorted(count, (number + 1) // 2)) for number in count]  # index of the middle value
    trend = np.full(len(x), np.nan)
    for index, (middle, number) in enumerate(zip(halves, count.tolist(), strict=True)):
        if number >= 2:
            mean, earlier = sums[index] / number, sums[middle] / count[middle]
            later = (sums[index] - sums[middle]) / (number - count[middle])
            # The difference of two halves has twice the standard error of the full mean.
            error = 2 * np.sqrt(max(squares[index] / number - mean**2, 0.0) / number)
            trend[index] = max(abs(later - earlier) - 2 * error, 0.0) / max(abs(mean), 1e-9)
    return trend, count.astype(np.float64)


def _is_at_end(run: Run) -> Holds:
    """Whether this is the last step of a finished run. [S]"""
    return np.asarray(run.steps >= (run.steps[-1] if run.state.standing == "finished" else np.inf))


def _nothing_moved_levels(run: Run) -> Levels:
    return levels((_is_at_end(run) & _has_not_moved(run), WARNING))


def _nothing_moved_evidence(run: Run) -> Sequence[Evidence]:
    name = "eval_loss" if np.isfinite(_metric(run, "eval_loss")).any() else "loss"
    x = _metric(run, name)
    return [Evidence(f"{run.stage}/{name}", f"{first(x):.5g} at the start, {last(x):.5g} at the end")]


def _nothing_moved_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause("the learning rate is too low", (), (), scale_setting(run, "optim.learning_rate", 10)),
        Cause("the model knows the data already, or the data has no pattern", (), (), Change("data.path", "")),
    ]


def _overfitted_levels(run: Run) -> Levels:
    held_out = _metric(run, "eval_loss")
    lowest = np.where(np.isfinite(held_out), np.fmin.accumulate(held_out), np.nan) if len(held_out) else held_out
    gain = first(held_out) - lowest
    with np.errstate(invalid="ignore", divide="ignore"):
        loss = carry_forward((held_out - lowest) / np.maximum(gain, SMALLEST_GAIN * np.abs(first(held_out))))
    # With `patience` the run keeps the weights of the lowest loss, so a rise does no harm.
    is_harmful = ~_has_not_moved(run) & (int(run.setting("patience", 0)) == 0)
    return levels_at_least(np.where(is_harmful, loss, np.nan), OVERFITTED)


def _overfitted_evidence(run: Run) -> Sequence[Evidence]:
    held_out = _metric(run, "eval_loss")
    text = f"{last(held_out):.4g} now, {np.nanmin(held_out):.4g} at its lowest, {first(held_out):.4g} at the start"
    return [
        Evidence(f"{run.stage}/eval_loss", text),
        Evidence(f"{run.stage}/loss", f"{last(_metric(run, 'loss')):.4g} on the training data"),
    ]


def _overfitted_causes(run: Run) -> Sequence[Cause]:
    epochs = float(run.setting("epochs", 1))
    return [
        Cause(
            "there are too many epochs",
            applicable_texts((epochs > 1, f"epochs is {epochs:g}")),
            applicable_texts((epochs <= 1, "there is one epoch at most")),
            Change("patience", "1, which keeps the best weights"),
        ),
        Cause("the learning rate is too high", (), (), scale_setting(run, "optim.learning_rate", 0.3)),
    ]


def _length_only_levels(run: Run) -> Levels:
    accuracy, length = carry_forward(_metric(run, "eval_accuracy")), last(_metric(run, "length_accuracy"))
    is_at_end = _is_at_end(run)
    return levels(
        (is_at_end & at_most(accuracy, length + OVER_LENGTH), WARNING),
        (is_at_end & at_most(accuracy, OVER_CHANCE), CRITICAL),
    )


def _length_only_evidence(run: Run) -> Sequence[Evidence]:
    accuracy, length = last(_metric(run, "eval_accuracy")), last(_metric(run, "length_accuracy"))
    text = f"{accuracy:.3f}; length alone reaches {length:.3f}, chance 0.5"
    return [Evidence(f"{run.stage}/eval_accuracy", text)]


def _length_only_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the raters disagree, so there is little to learn",
            (),
            (),
            Change("", "check the agreement (keel rank STORE --stats) and collect more rankings of the same items"),
        ),
        Cause("there are too few rankings", (), (), Change("data.path", "more rankings")),
        Cause("the model has hardly been trained", (), (), scale_setting(run, "optim.learning_rate", 3)),
    ]


def _skipped_levels(run: Run) -> Levels:
    skipped = _metric(run, "skipped")
    with np.errstate(invalid="ignore"):
        share = np.nancumsum(skipped) / np.maximum(np.cumsum(np.isfinite(skipped)), 1)
    result = levels_at_least(share, SKIPPED)
    if is_failure(run, "Diverged"):
        result[-1:] = CRITICAL
    return result


def _skipped_evidence(run: Run) -> Sequence[Evidence]:
    text = f"the run ended with {run.state.what}"
    error = [Evidence(f"{run.stage}/loss", text)] if is_failure(run, "Diverged") else []
    return [*error, Evidence(f"{run.stage}/skipped", f"{np.nansum(_metric(run, 'skipped')):g} updates were skipped")]


def _skipped_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the learning rate is too high",
            ("an update would have damaged the model",),
            (),
            scale_setting(run, "optim.learning_rate", 0.3),
        )
    ]


def _less_likely_levels(run: Run) -> Levels:
    chosen = run["dpo/eval_chosen_logprob"]
    return levels_at_least(first(chosen) - carry_forward(chosen), LESS_LIKELY)


def _less_likely_evidence(run: Run) -> Sequence[Evidence]:
    x = run["dpo/eval_chosen_logprob"]
    return [Evidence("dpo/eval_chosen_logprob", f"{last(x):.4g} now, {first(x):.4g} at the start, nats per response")]


def _less_likely_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "beta is too small: probability moves to responses that nobody has ranked",
            (f"beta is {run.setting('beta')}",),
            (),
            scale_setting(run, "beta", 3),
        ),
        Cause("the learning rate is too high", (), (), scale_setting(run, "optim.learning_rate", 0.3)),
    ]


RULES = (
    Rule(
        "nothing-moved",
        "Nothing was learned: the loss did not change.",
        "supervised",
        _nothing_moved_levels,
        _nothing_moved_evidence,
        _nothing_moved_causes,
        Documentation(
            measure=f"change of `*/eval_loss`, `*/eval_accuracy` and `*/loss` over a finished run of {FEWEST_LOSSES} "
            "losses or more",
            thresholds=(
                Threshold("largest change of the held-out loss", warning=f"<= {LOSS_CHANGE:.0%}"),
                Threshold("largest change of the held-out accuracy", warning=f"<= {ACCURACY_CHANGE:g}"),
                Threshold("difference of the loss between the two halves, less 2 se", warning=f"<= {TREND:.0%}"),
            ),
            combine="All rows must hold.",
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        patience=1,
    ),
    Rule(
        "overfitted",
        "The held-out loss rises: the model memorises the training data.",
        "supervised",
        _overfitted_levels,
        _overfitted_evidence,
        _overfitted_causes,
        Documentation(
            measure="rise of `*/eval_loss` above its lowest value / its fall from the start to that value",
            thresholds=(threshold("rise / fall", OVERFITTED, ">= {:.0%}"),),
            note="Not reported with `patience`, which keeps the weights of the lowest loss, nor where nothing moved.",
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        patience=1,
    ),
    Rule(
        "no-better-than-length",
        "The reward model ranks responses no better than their length does.",
        "reward model",
        _length_only_levels,
        _length_only_evidence,
        _length_only_causes,
        Documentation(
            measure="last `reward/eval_accuracy` of a finished run, against `reward/length_accuracy`",
            thresholds=(
                Threshold(
                    "held-out accuracy", warning=f"<= length alone + {OVER_LENGTH:g}", critical=f"<= {OVER_CHANCE:g}"
                ),
            ),
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        patience=1,
        follows=("nothing-moved", "overfitted"),
    ),
    Rule(
        "updates-skipped",
        "Updates are skipped because they would damage the model.",
        "update",
        _skipped_levels,
        _skipped_evidence,
        _skipped_causes,
        Documentation(
            measure="mean of `*/skipped` over the run so far",
            thresholds=(
                threshold("share of updates skipped", SKIPPED, ">= {:.0%}"),
                Threshold("end of the run", critical="a `Diverged` error"),
            ),
            combine="Any row is enough.",
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        patience=1,
    ),
    Rule(
        "chosen-less-likely",
        "The chosen responses became less likely.",
        "update",
        _less_likely_levels,
        _less_likely_evidence,
        _less_likely_causes,
        Documentation(
            measure="fall of `dpo/eval_chosen_logprob` since the first evaluation",
            thresholds=(threshold("nats per response", LESS_LIKELY),),
            source="Pal et al. 2024, Razin et al. 2024",
        ),
        patience=1,
    ),
)
