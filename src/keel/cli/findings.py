"""Print a diagnosis on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from keel.terminal import literal

if TYPE_CHECKING:
    from keel.diagnosis.findings import Diagnosis, Finding


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print the verdict, then each finding with its evidence, likely causes and suggested changes."""
    for line in diagnosis_lines(diagnosis):
        print(literal(line))


def diagnosis_lines(diagnosis: Diagnosis) -> Iterator[str]:
    state = diagnosis.state
    status = state.standing + (f": {state.what}" if state.what else "")
    yield f"{diagnosis.path}: {diagnosis.verdict} (step {diagnosis.last_step} of {diagnosis.planned}, {status})"
    for number, finding in enumerate(diagnosis.findings, start=1):
        yield ""
        yield from finding_lines(number, finding, diagnosis.last_step)
    if diagnosis.findings:
        yield ""


def finding_lines(number: int, finding: Finding, last_step: int) -> Iterator[str]:
    until = "" if finding.is_open else f" to {finding.last_step}, no longer holds"
    if finding.is_open and finding.last_seen is not None and finding.last_seen < last_step:
        until = f", last seen in step {finding.last_seen}"
    yield f"{number}. {finding.severity}: {finding.name}, from step {finding.first_step}{until}"
    yield f"   {finding.title}" + (f" It follows from {finding.follows_from}." if finding.follows_from else "")
    yield from (f"   - {evidence.figure}: {evidence.says}" for evidence in finding.evidence)
    for rank, cause in enumerate(finding.causes, start=1):
        yield f"   cause {rank}: {cause.what}"
        yield from (f"      for: {reason}" for reason in cause.speaks_for)
        yield from (f"      against: {reason}" for reason in cause.speaks_against)
        change = cause.change
        yield f"      try: {change.setting + ': ' if change.setting else ''}{change.to}"
