"""What a doctor says: a finding, the figures that show it, what may have caused it, and which setting to change."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from keel.run.read.run import State

Severity = Literal["critical", "warning", "notice"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "notice")


@dataclass(frozen=True)
class Evidence:
    """A figure of the run, and what it says. `figure` is a key of metrics.jsonl, drawn beside the words."""

    figure: str
    says: str


@dataclass(frozen=True)
class Change:
    """What to do: a setting and what to set it to, or an action in words with no setting."""

    setting: str
    to: str


@dataclass(frozen=True)
class Cause:
    """A likely cause, what speaks for it and against it in this run, and what would mend it."""

    what: str
    speaks_for: tuple[str, ...]
    speaks_against: tuple[str, ...]
    change: Change


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run."""

    name: str  # as in docs/diagnosis.md, such as "kl-runaway"
    title: str  # one sentence
    severity: Severity
    stage: str  # what to look at: prompts, reward model, sampler, reference, update, critic, policy
    first_step: int  # since when it has been so; it is said some steps later, when it has lasted
    last_step: int | None  # None: still so at the last step of the run
    evidence: tuple[Evidence, ...]
    causes: tuple[Cause, ...]  # likeliest first
    follows_from: str | None = None  # the name of an earlier finding that explains this one
    last_seen: int | None = (
        None  # the last step in which it held, of which the evidence is: it may be open a little longer
    )

    @property
    def is_open(self) -> bool:
        return self.last_step is None


@dataclass(frozen=True)
class Diagnosis:
    """All findings of a run, the diagnosis first: open before closed, what explains others before what it explains."""

    path: str
    name: str
    stage: str
    state: State
    last_step: int
    planned: int
    findings: tuple[Finding, ...]
    measured: bool = True  # whether any metric is a number; without one no rule can see anything

    @property
    def verdict(self) -> str:
        """healthy, notice, warning or critical: the worst that is open; "unknown" where nothing was measured."""
        if not self.findings and not (self.last_step and self.measured):
            return "unknown"
        worst = {finding.severity for finding in self.findings if finding.is_open}
        return next((severity for severity in SEVERITIES if severity in worst), "healthy")

    @property
    def gravest(self) -> Finding | None:
        """The gravest finding that is open, of these the first; where all are over, the first. None = no finding."""
        live = [finding for finding in self.findings if finding.is_open]
        first = next(iter(self.findings), None)
        return min(live, key=lambda finding: SEVERITIES.index(finding.severity), default=first)

    def as_json(self) -> Mapping[str, Any]:
        return {**asdict(self), "verdict": self.verdict}
