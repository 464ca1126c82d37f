"""Does the learning rate reach its setting?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.evidence import applicable_texts, format_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import MEASURED_IN_ZOO, WARNING, Documentation, Levels, Rule, Threshold, levels
from keel.run.read.run import Run
from keel.run.read.series import at_most, last

LONG_WARMUP = 0.5  # of the run's optimizer steps
LOW_RATE = 0.05  # of optim.learning_rate
MIDDLE = (0.1, 0.75)  # of the run: the warm-up is over and a decay has not ended


def optimizer_steps(run: Run) -> float:
    """Return the number of optimizer steps in one step: epochs times minibatches."""
    batch = float(run.setting("rollout.batch_size", 64))
    epochs = float(run.setting("algorithm.update_epochs", 1))
    return epochs * batch / float(run.setting("algorithm.minibatch_size", batch))


def _schedule_levels(run: Run) -> Levels:
    total = run.planned * optimizer_steps(run)
    never = np.full(len(run.steps), float(run.setting("optim.warmup_steps", 0)) > LONG_WARMUP * total)
    rate, peak = run["policy/learning_rate"], float(run.setting("optim.learning_rate", 0) or np.nan)
    critic_only = run.steps <= float(run.setting("critic.warmup_steps", 0))
    middle = (run.steps > MIDDLE[0] * run.planned) & (run.steps < MIDDLE[1] * run.planned) & ~critic_only
    return levels((never | middle & at_most(rate, LOW_RATE * peak), WARNING))


def _schedule_evidence(run: Run) -> Sequence[Evidence]:
    peak, warmup = run.setting("optim.learning_rate"), run.setting("optim.warmup_steps", 0)
    total = run.planned * optimizer_steps(run)
    now = format_evidence(last(run["policy/learning_rate"]))
    text = f"{now} now; the setting is {peak:g}, reached after {warmup:g} of {total:g} optimizer steps"
    return [Evidence("policy/learning_rate", text)]


def _schedule_causes(run: Run) -> Sequence[Cause]:
    total = run.planned * optimizer_steps(run)
    warmup = float(run.setting("optim.warmup_steps", 0))
    is_long = warmup > LONG_WARMUP * total
    warmup_text = f"the warm-up is {warmup:g} of {total:g} optimizer steps"
    schedule = run.setting("optim.schedule")
    return [
        Cause(
            "the warm-up is longer than the run",
            applicable_texts((is_long, warmup_text)),
            applicable_texts((warmup <= LONG_WARMUP * total, warmup_text)),
            Change("optim.warmup_steps", f"{max(1, round(0.05 * total))} (it counts optimizer steps)"),
        ),
        Cause(
            "the schedule ends before the run does",
            applicable_texts((schedule != "constant", f"optim.schedule is {schedule}")),
            (),
            Change("optim.schedule", "constant, or set steps to the intended number"),
        ),
    ]


RULES = (
    Rule(
        "learning-rate-schedule",
        "The learning rate is nearly 0 while the run should learn.",
        "update",
        _schedule_levels,
        _schedule_evidence,
        _schedule_causes,
        Documentation(
            measure="`policy/learning_rate` relative to `optim.learning_rate`, and the length of the warm-up",
            thresholds=(
                Threshold("`optim.warmup_steps`", warning=f"> {LONG_WARMUP:.0%} of the run's optimizer steps"),
                Threshold(
                    f"rate between {MIDDLE[0]:.0%} and {MIDDLE[1]:.0%} of the run",
                    warning=f"<= {LOW_RATE:.0%} of the setting",
                ),
            ),
            combine="Any row is enough.",
            note="Steps in which only the critic learns (`critic.warmup_steps`) do not count.",
            source=MEASURED_IN_ZOO,
        ),
    ),
)
