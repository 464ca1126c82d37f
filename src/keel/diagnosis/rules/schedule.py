"""Does the learning rate ever come to where it is asked to be?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import WARNING, Levels, Rule, applicable_texts, format_evidence, levels
from keel.run.read.run import Run
from keel.run.read.series import at_most, last


def optimizer_steps(run: Run) -> float:
    """Optimizer steps of one step: epochs times minibatches."""
    batch = float(run.setting("rollout.batch_size", 64))
    return (
        float(run.setting("algorithm.update_epochs", 1)) * batch / float(run.setting("algorithm.minibatch_size", batch))
    )


def _schedule(run: Run) -> Levels:
    total = run.planned * optimizer_steps(run)
    warmup = float(run.setting("optim.warmup_steps", 0))
    never = np.full(len(run.steps), warmup > 0.5 * total)
    rate, peak = run["policy/learning_rate"], float(run.setting("optim.learning_rate", 0) or np.nan)
    warming = run.steps <= float(run.setting("critic.warmup_steps", 0))
    middle = (run.steps > 0.1 * run.planned) & (run.steps < 0.75 * run.planned) & ~warming
    low = middle & at_most(rate, 0.05 * peak)
    return levels((never | low, WARNING))


def _schedule_evidence(run: Run) -> Sequence[Evidence]:
    peak, warmup = run.setting("optim.learning_rate"), run.setting("optim.warmup_steps", 0)
    total = run.planned * optimizer_steps(run)
    now = last(run["policy/learning_rate"])
    text = f"{format_evidence(now)} now; {peak:g} is asked for, after {warmup:g} of {total:g} optimizer steps"
    return [Evidence("policy/learning_rate", text)]


def _schedule_causes(run: Run) -> Sequence[Cause]:
    total = run.planned * optimizer_steps(run)
    warmup = float(run.setting("optim.warmup_steps", 0))
    return [
        Cause(
            "the warm-up is longer than the run",
            applicable_texts((warmup > 0.5 * total, f"{warmup:g} optimizer steps of warm-up in a run of {total:g}")),
            applicable_texts((warmup <= 0.5 * total, f"{warmup:g} optimizer steps of warm-up in a run of {total:g}")),
            Change("optim.warmup_steps", f"{max(1, round(0.05 * total))} (it counts optimizer steps)"),
        ),
        Cause(
            "the schedule has come to its end before the run",
            applicable_texts(
                (run.setting("optim.schedule") != "constant", f"optim.schedule is {run.setting('optim.schedule')}")
            ),
            (),
            Change("optim.schedule", "constant, or as many steps as are meant"),
        ),
    ]


RULES = (
    Rule(
        "learning-rate-schedule",
        "The learning rate is next to nothing while the run should be learning.",
        "update",
        _schedule,
        _schedule_evidence,
        _schedule_causes,
    ),
)
