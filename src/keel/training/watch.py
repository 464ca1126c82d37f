"""Run the doctor's rules during training, and print a line when a finding opens or closes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keel.config import TrainConfig
from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import SEVERITIES, Finding
from keel.errors import Halted
from keel.run.folder import RunFolder
from keel.run.read.run import Run, State, read_metrics
from keel.terminal import print_line

EVERY_STEP = 200
"""Up to this step, every step is diagnosed; later, only when the log has grown by a hundredth.

A diagnosis reads the full log, so diagnosing every step would cost time quadratic in the number of steps.
"""


@dataclass
class Watch:
    """The metrics logged so far and the findings reported so far. Only the main rank has one."""

    folder: RunFolder
    settings: Mapping[str, Any]
    mode: str  # quiet, tell or stop
    lines: list[Mapping[str, Any]] = field(default_factory=list)
    reported: dict[tuple[str, int], Finding] = field(default_factory=dict)  # open findings, by name and first step

    @classmethod
    def start(cls, folder: RunFolder, config: TrainConfig) -> "Watch":
        """Read the log of a resumed run, and print the findings that are still open in it."""
        watch = cls(folder, config.model_dump(mode="json"), config.doctor)
        if config.doctor != "quiet":
            watch.lines = read_metrics(folder.metrics)
            findings = watch._open_findings() if watch.lines else {}
            watch.reported = {key: finding for key, finding in findings.items() if _is_reportable(finding)}
            for finding in watch.reported.values():
                _say(f"still open since step {finding.first_step}: {finding.severity} {finding.name}")
        return watch

    def look(self, step: int, metrics: Mapping[str, float]) -> Finding | None:
        """Print what has changed. Return the critical finding that stops the run, if there is one."""
        if self.mode == "quiet":
            return None
        self.lines.append({"step": step, **metrics})
        if len(self.lines) > EVERY_STEP and len(self.lines) % (len(self.lines) // 100):
            return None
        now = self._open_findings()
        for key, finding in now.items():
            previous = self.reported.get(key)
            if _is_reportable(finding) and (previous is None or _is_worse(finding, previous)):
                _say(format_finding(finding))
                self.reported[key] = finding
        for name, first in self.reported.keys() - now.keys():
            _say(f"{name}, open since step {first}, is over")
            del self.reported[name, first]
        worst = (finding for finding in now.values() if finding.severity == "critical" and self.mode == "stop")
        return next(worst, None)

    def _open_findings(self) -> dict[tuple[str, int], Finding]:
        run = Run.of_lines(self.folder.path, self.settings, self.lines, State("running"))
        return {(finding.name, finding.first_step): finding for finding in diagnose(run).findings if finding.is_open}


def _is_reportable(finding: Finding) -> bool:
    """Whether a finding is critical, or a warning that does not follow from another finding."""
    return finding.severity == "critical" or (finding.severity == "warning" and finding.follows_from is None)


def _is_worse(finding: Finding, previous: Finding) -> bool:
    return SEVERITIES.index(finding.severity) < SEVERITIES.index(previous.severity)


def format_finding(finding: Finding) -> str:
    """Format a finding as one line."""
    change = finding.causes[0].change
    advice = f"{change.setting}: {change.to}" if change.setting else change.to
    return f"{finding.severity}: {finding.name} since step {finding.first_step}: {finding.title} -> try {advice}"


def halt_error(finding: Finding | None, step: int, folder: RunFolder) -> Halted:
    """Return the error that ends a run with `doctor: stop`. Only the main rank has the finding."""
    if finding is None:
        return Halted("the doctor of the main process has stopped the run", f"step {step}")
    what = f"{finding.name} since step {finding.first_step}: {finding.title}"
    return Halted(what, f"step {step}", f"keel doctor {folder.path}, or set doctor: tell and --resume")


def _say(what: str) -> None:
    print_line(f"doctor: {what}")
