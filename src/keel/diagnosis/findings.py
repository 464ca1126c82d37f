"""What the doctor reports: findings with their evidence, likely causes and proposed changes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from keel.run.read.run import State

Severity = Literal["critical", "warning", "notice"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "notice")


@dataclass(frozen=True)
class Evidence:
    """A metric of the run and what it shows. `figure` is a key of metrics.jsonl; reports plot it beside the text."""

    figure: str
    says: str


@dataclass(frozen=True)
class Change:
    """A proposed change: a setting and its new value, or an action in words with an empty setting."""

    setting: str
    to: str


@dataclass(frozen=True)
class Cause:
    """A likely cause, the evidence for and against it in this run, and the change that removes it."""

    what: str
    speaks_for: tuple[str, ...]
    speaks_against: tuple[str, ...]
    change: Change


@dataclass(frozen=True)
class Finding:
    """One diagnosed fault of a run."""

    name: str  # as in docs/reference/findings.md, such as "kl-runaway"
    title: str  # one sentence
    severity: Severity
    stage: str  # what to look at: prompts, reward model, sampler, reference, update, critic, policy
    first_step: int  # the step at which it began; it is reported some steps later, once it has lasted
    last_step: int | None  # None: it still holds at the last step of the run
    evidence: tuple[Evidence, ...]
    causes: tuple[Cause, ...]  # likeliest first
    follows_from: str | None = None  # the name of the finding that explains this one
    last_seen: int | None = None  # the last step at which it held, from which the evidence is taken

    @property
    def is_open(self) -> bool:
        return self.last_step is None


@dataclass(frozen=True)
class Diagnosis:
    """All findings of a run, root causes first and open findings before closed ones."""

    path: str
    name: str
    stage: str
    state: State
    last_step: int
    planned: int
    findings: tuple[Finding, ...]
    measured: bool = True  # whether any metric is a number; no rule can hold without one

    @property
    def verdict(self) -> str:
        """The worst open severity, "healthy" if no finding is open, "unknown" if nothing was measured."""
        if not self.findings and not (self.last_step and self.measured):
            return "unknown"
        severities = {finding.severity for finding in self.findings if finding.is_open}
        return next((severity for severity in SEVERITIES if severity in severities), "healthy")

    @property
    def gravest(self) -> Finding | None:
        """The first of the worst open findings; the first finding if none is open; None if there is none."""
        live = [finding for finding in self.findings if finding.is_open]
        first = next(iter(self.findings), None)
        return min(live, key=lambda finding: SEVERITIES.index(finding.severity), default=first)

    def as_json(self) -> Mapping[str, Any]:
        return {**asdict(self), "verdict": self.verdict}
