"""The stages before policy learning: keel sft, keel reward, keel dpo."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import CRITICAL, WARNING, Levels, Rule, applicable_texts, is_failure, levels, scale_setting
from keel.run.read.run import Run, Series
from keel.run.read.series import at_least, at_most, carry_forward, first, last

FEWEST_LOSSES = 10  # with which a trend can be separated from noise
BFLOAT16_RATE = 1e-4  # AdamW's steps are about as large as the rate, and half of bfloat16's steps at 0.02 to 0.05


def _figure(run: Run, name: str) -> Series:
    return run[f"{run.stage}/{name}"]


def _still(run: Run) -> NDArray[np.bool_]:
    """Whether nothing has been learned so far: no held-out figure and no trend of the loss beyond 1 and 2%. [S]"""
    held_out, accuracy = _figure(run, "eval_loss"), _figure(run, "eval_accuracy")
    moved = np.fmax.accumulate(np.abs(held_out - first(held_out))) / abs(first(held_out))
    changed = np.fmax.accumulate(np.abs(accuracy - first(accuracy)))
    trend, count = _trend(_figure(run, "loss"))
    with np.errstate(invalid="ignore"):
        return (count >= FEWEST_LOSSES) & ~(moved > 0.01) & ~(changed > 0.02) & ~(trend > 0.02)


def _trend(x: Series) -> tuple[Series, Series]:
    """How far the mean of the later half of a figure so far is from that of the earlier half, beyond two standard
    errors, as a share of the mean; and how many values there are. [S], [S]"""
    finite = np.isfinite(x)
    values = np.where(finite, x, 0.0)
    sums, squares, count = np.cumsum(values), np.cumsum(values**2), np.cumsum(finite)
    halves = [int(np.searchsorted(count, (number + 1) // 2)) for number in count]  # place of the middle value
    found = np.full(len(x), np.nan)
    for place, (middle, number) in enumerate(zip(halves, count.tolist(), strict=True)):
        if number >= 2:
            mean, earlier = sums[place] / number, sums[middle] / count[middle]
            later = (sums[place] - sums[middle]) / (number - count[middle])
            error = 2 * 2 * np.sqrt(max(squares[place] / number - mean**2, 0.0) / number)  # of a difference of halves
            found[place] = max(abs(later - earlier) - error, 0.0) / max(abs(mean), 1e-9)
    return found, count.astype(np.float64)


def _nothing_moved(run: Run) -> Levels:
    ended = run.state.standing == "finished"
    return levels(((run.steps >= (run.steps[-1] if ended else np.inf)) & _still(run), WARNING))


def _nothing_moved_evidence(run: Run) -> Sequence[Evidence]:
    name = "eval_loss" if np.isfinite(_figure(run, "eval_loss")).any() else "loss"
    x = _figure(run, name)
    return [Evidence(f"{run.stage}/{name}", f"{first(x):.5g} at the start, {last(x):.5g} at the end")]


def _nothing_moved_causes(run: Run) -> Sequence[Cause]:
    rate = float(run.setting("optim.learning_rate", 5e-5))
    rounded = run.setting("dtype", "float32") == "bfloat16" and not run.setting("lora", None) and rate < BFLOAT16_RATE
    return [
        Cause(
            "bfloat16 rounds the updates away: of a weight of 0.02 it keeps steps of 0.0001",
            applicable_texts((rounded, f"the weights are bfloat16, the learning rate is {rate:g}")),
            applicable_texts((not rounded, "the weights are not in bfloat16, or the learning rate is above its steps")),
            Change("dtype", "float32, or an adapter (lora), whose weights begin at zero"),
        ),
        Cause("the learning rate is too low", (), (), scale_setting(run, "optim.learning_rate", 10)),
        Cause(
            "the model knows the data already, or there is nothing in it to be learned", (), (), Change("data.path", "")
        ),
    ]


def _overfitted(run: Run) -> Levels:
    """With `patience` the weights of the lowest loss are kept, so that a rise does no harm."""
    held_out = _figure(run, "eval_loss")
    lowest = np.where(np.isfinite(held_out), np.fmin.accumulate(held_out), np.nan) if len(held_out) else held_out
    gained = first(held_out) - lowest
    with np.errstate(invalid="ignore", divide="ignore"):
        lost = carry_forward((held_out - lowest) / np.maximum(gained, 0.01 * np.abs(first(held_out))))
    harmful = ~_still(run) & (int(run.setting("patience", 0)) == 0)
    return levels((at_least(lost, 0.1) & harmful, WARNING), (at_least(lost, 0.5) & harmful, CRITICAL))


def _overfitted_evidence(run: Run) -> Sequence[Evidence]:
    held_out = _figure(run, "eval_loss")
    text = f"{last(held_out):.4g} now, {np.nanmin(held_out):.4g} at its lowest, {first(held_out):.4g} at the start"
    return [
        Evidence(f"{run.stage}/eval_loss", text),
        Evidence(f"{run.stage}/loss", f"{last(_figure(run, 'loss')):.4g} on what is learned"),
    ]


def _overfitted_causes(run: Run) -> Sequence[Cause]:
    epochs = float(run.setting("epochs", 1))
    return [
        Cause(
            "the data is gone through too often",
            applicable_texts((epochs > 1, f"epochs is {epochs:g}")),
            applicable_texts((epochs <= 1, "it is gone through once")),
            Change("patience", "1, which keeps the best weights"),
        ),
        Cause("the learning rate is too high", (), (), scale_setting(run, "optim.learning_rate", 0.3)),
    ]


def _by_length(run: Run) -> Levels:
    accuracy, length = carry_forward(_figure(run, "eval_accuracy")), last(_figure(run, "length_accuracy"))
    ended = run.state.standing == "finished"
    trained = run.steps >= (run.steps[-1] if ended else np.inf)
    return levels((trained & at_most(accuracy, length + 0.02), WARNING), (trained & at_most(accuracy, 0.52), CRITICAL))


def _by_length_evidence(run: Run) -> Sequence[Evidence]:
    accuracy, length = last(_figure(run, "eval_accuracy")), last(_figure(run, "length_accuracy"))
    text = f"{accuracy:.3f}, where length alone has {length:.3f} and chance 0.5"
    return [Evidence(f"{run.stage}/eval_accuracy", text)]


def _by_length_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "people do not agree, so that there is little to learn",
            (),
            (),
            Change("", "keel rank STORE --stats: agreement between raters; more rankings of the same items"),
        ),
        Cause("there are too few rankings", (), (), Change("data.path", "more rankings")),
        Cause("the model has hardly been trained", (), (), scale_setting(run, "optim.learning_rate", 3)),
    ]


def _left_out(run: Run) -> Levels:
    skipped = _figure(run, "skipped")
    with np.errstate(invalid="ignore"):
        share = np.nancumsum(skipped) / np.maximum(np.cumsum(np.isfinite(skipped)), 1)
    found = levels((at_least(share, 0.05), WARNING), (at_least(share, 0.3), CRITICAL))
    if is_failure(run, "Diverged"):
        found[-1:] = CRITICAL
    return found


def _left_out_evidence(run: Run) -> Sequence[Evidence]:
    words = f"the run ended with {run.state.what}"
    ended = [Evidence(f"{run.stage}/loss", words)] if is_failure(run, "Diverged") else []
    return [*ended, Evidence(f"{run.stage}/skipped", f"{np.nansum(_figure(run, 'skipped')):g} updates were left out")]


def _left_out_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the learning rate is too high",
            ("an update would have done harm",),
            (),
            scale_setting(run, "optim.learning_rate", 0.3),
        )
    ]


def _less_likely(run: Run) -> Levels:
    chosen = carry_forward(run["dpo/eval_chosen_logprob"])
    fall = first(run["dpo/eval_chosen_logprob"]) - chosen
    return levels((at_least(fall, 5.0), WARNING), (at_least(fall, 20.0), CRITICAL))


def _less_likely_evidence(run: Run) -> Sequence[Evidence]:
    x = run["dpo/eval_chosen_logprob"]
    return [Evidence("dpo/eval_chosen_logprob", f"{last(x):.4g} now, {first(x):.4g} at the start, in nats an answer")]


def _less_likely_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "beta is too small: the mass goes to answers that nobody has judged",
            (f"beta is {run.setting('beta')}",),
            (),
            scale_setting(run, "beta", 3),
        ),
        Cause("the learning rate is too high", (), (), scale_setting(run, "optim.learning_rate", 0.3)),
    ]


RULES = (
    Rule("nothing-moved", "Nothing was learned: the loss is what it was.", "supervised", _nothing_moved,
         _nothing_moved_evidence, _nothing_moved_causes, patience=1),
    Rule("overfitted", "The held-out loss rises: the data is learned by heart.", "supervised", _overfitted,
         _overfitted_evidence, _overfitted_causes, patience=1),
    Rule("no-better-than-length", "It tells good answers from bad no better than their length does.", "reward model",
         _by_length, _by_length_evidence, _by_length_causes, patience=1, follows=("nothing-moved", "overfitted")),
    Rule("updates-skipped", "Updates are left out because they would have done harm.", "update", _left_out,
         _left_out_evidence, _left_out_causes, patience=1),
    Rule("chosen-less-likely", "The answers that people chose became less likely.", "update", _less_likely,
         _less_likely_evidence, _less_likely_causes, patience=1),
)  # fmt: skip
