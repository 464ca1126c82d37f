"""The stages before policy learning: keel sft, keel reward, keel dpo."""

from collections.abc import Sequence

import numpy as np

from keel.diagnose.findings import Cause, Change, Evidence
from keel.diagnose.rule import CRITICAL, WARNING, Levels, Rule, ended_with, levels, reasons, scaled
from keel.diagnose.run import Run, Series
from keel.diagnose.series import at_least, at_most, carried, first, last


def _figure(run: Run, name: str) -> Series:
    return run[f"{run.stage}/{name}"]


def _overfitted(run: Run) -> Levels:
    """With `patience` the weights of the lowest loss are kept, so that a rise does no harm."""
    held_out = _figure(run, "eval_loss")
    lowest = np.where(np.isfinite(held_out), np.fmin.accumulate(held_out), np.nan) if len(held_out) else held_out
    gained = first(held_out) - lowest
    with np.errstate(invalid="ignore", divide="ignore"):
        lost = carried((held_out - lowest) / np.maximum(gained, 0.01 * np.abs(first(held_out))))
    kept = int(run.setting("patience", 0)) > 0
    return levels((at_least(lost, 0.1) & ~np.bool_(kept), WARNING), (at_least(lost, 0.5) & ~np.bool_(kept), CRITICAL))


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
            reasons((epochs > 1, f"epochs is {epochs:g}")),
            reasons((epochs <= 1, "it is gone through once")),
            Change("patience", "1, which keeps the best weights"),
        ),
        Cause("the learning rate is too high", (), (), scaled(run, "optim.learning_rate", 0.3)),
    ]


def _by_length(run: Run) -> Levels:
    accuracy, length = carried(_figure(run, "eval_accuracy")), last(_figure(run, "length_accuracy"))
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
        Cause("the model has hardly been trained", (), (), scaled(run, "optim.learning_rate", 3)),
    ]


def _left_out(run: Run) -> Levels:
    skipped = _figure(run, "skipped")
    with np.errstate(invalid="ignore"):
        share = np.nancumsum(skipped) / np.maximum(np.cumsum(np.isfinite(skipped)), 1)
    found = levels((at_least(share, 0.05), WARNING), (at_least(share, 0.3), CRITICAL))
    if ended_with(run, "Diverged"):
        found[-1:] = CRITICAL
    return found


def _left_out_evidence(run: Run) -> Sequence[Evidence]:
    words = f"the run ended with {run.state.what}"
    ended = [Evidence(f"{run.stage}/loss", words)] if ended_with(run, "Diverged") else []
    return [*ended, Evidence(f"{run.stage}/skipped", f"{np.nansum(_figure(run, 'skipped')):g} updates were left out")]


def _left_out_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the learning rate is too high",
            ("an update would have done harm",),
            (),
            scaled(run, "optim.learning_rate", 0.3),
        )
    ]


def _less_likely(run: Run) -> Levels:
    chosen = carried(run["dpo/eval_chosen_logprob"])
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
            scaled(run, "beta", 3),
        ),
        Cause("the learning rate is too high", (), (), scaled(run, "optim.learning_rate", 0.3)),
    ]


RULES = (
    Rule("overfitted", "The held-out loss rises: the data is learned by heart.", "supervised", _overfitted,
         _overfitted_evidence, _overfitted_causes, patience=1),
    Rule("no-better-than-length", "It tells good answers from bad no better than their length does.", "reward model",
         _by_length, _by_length_evidence, _by_length_causes, patience=1, follows=("overfitted",)),
    Rule("updates-skipped", "Updates are left out because they would have done harm.", "update", _left_out,
         _left_out_evidence, _left_out_causes, patience=1),
    Rule("chosen-less-likely", "The answers that people chose became less likely.", "update", _less_likely,
         _less_likely_evidence, _less_likely_causes, patience=1),
)  # fmt: skip
