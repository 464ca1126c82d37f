"""Did the run reach its last step?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.findings import Cause, Change, Evidence, Finding, Severity
from keel.diagnosis.rule import CRITICAL, NOTICE, TESTED_ON_SYNTHETIC_RUNS, Documentation, Levels, Rule, Threshold
from keel.diagnosis.rules.learning import UPSTREAM
from keel.run.read.run import Run

TITLE = "The run ended before its last step."


def _ended_levels(run: Run) -> Levels:
    result = np.zeros(len(run.steps), dtype=np.int8)
    result[-1:] = {"died": NOTICE, "failed": CRITICAL}.get(run.state.standing, 0)
    return result


def _ended_evidence(run: Run) -> Sequence[Evidence]:
    metric = "objective/scores" if run.stage == "train" else f"{run.stage}/loss"
    text = f"the last step was {run.steps[-1]} of {run.planned}" if len(run.steps) else "no step was finished"
    return [Evidence(metric, text)]


def _ended_causes(run: Run) -> Sequence[Cause]:
    if run.state.standing == "died":
        what = "the process was killed: by a person, for lack of memory, or by a power cut"
        fix = "repeat the command with --resume; it continues from the last checkpoint"
    else:
        what = "an error, which the run reported before it ended"
        fix = "fix the error, then repeat the command with --resume"
    return [Cause(what, (run.state.what,), (), Change("", fix))]


def findings_without_steps(run: Run) -> list[Finding]:
    """Return the findings about a run that logged no step: that it failed or died, if it did."""
    if run.state.standing not in ("died", "failed"):
        return []
    severity: Severity = "notice" if run.state.standing == "died" else "critical"
    return [
        Finding("run-ended", TITLE, severity, "run", 0, None, tuple(_ended_evidence(run)), tuple(_ended_causes(run)))
    ]


RULES = (
    Rule(
        "run-ended",
        TITLE,
        "run",
        _ended_levels,
        _ended_evidence,
        _ended_causes,
        Documentation(
            measure="how the run ended: `ended.json`, or whether its process exists",
            thresholds=(
                Threshold(
                    "state of the run", notice="its process is gone", critical="it failed; `ended.json` has the error"
                ),
            ),
            source=TESTED_ON_SYNTHETIC_RUNS,
            note="It is reported for a run without any finished step too.",
        ),
        patience=1,
        follows=(*UPSTREAM, "instability"),
    ),
)
