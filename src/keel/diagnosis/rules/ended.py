"""Did the run come to its end?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.findings import Cause, Change, Evidence, Finding, Severity
from keel.diagnosis.rule import CRITICAL, NOTICE, Levels, Rule
from keel.diagnosis.rules.learning import UPSTREAM
from keel.run.read.run import Run

TITLE = "The run ended before its last step."


def _ended(run: Run) -> Levels:
    found = np.zeros(len(run.steps), dtype=np.int8)
    found[-1:] = {"died": NOTICE, "failed": CRITICAL}.get(run.state.standing, 0)
    return found


def _evidence(run: Run) -> Sequence[Evidence]:
    metric = "objective/scores" if run.stage == "train" else f"{run.stage}/loss"
    last = f"step {run.steps[-1]} of {run.planned} was the last" if len(run.steps) else "no step was finished"
    return [Evidence(metric, last)]


def _causes(run: Run) -> Sequence[Cause]:
    killed = "the process was killed: by a person, by the machine for want of memory, or by a power cut"
    failed = "an error, which the run told before it ended"
    again = (
        "mend it and give the same command with --resume"
        if run.state.standing == "failed"
        else ("the same command with --resume goes on from the last checkpoint")
    )
    what = killed if run.state.standing == "died" else failed
    return [Cause(what, (run.state.what,), (), Change("", again))]


def before_first_step(run: Run) -> list[Finding]:
    """Of a run that logged nothing, all that can be said: that it failed or died, and with what."""
    if run.state.standing not in ("died", "failed"):
        return []
    severity: Severity = "notice" if run.state.standing == "died" else "critical"
    return [Finding("run-ended", TITLE, severity, "run", 0, None, tuple(_evidence(run)), tuple(_causes(run)))]


RULES = (Rule("run-ended", TITLE, "run", _ended, _evidence, _causes, patience=1, follows=(*UPSTREAM, "instability")),)
