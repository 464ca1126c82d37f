"""Run the doctor's rules during training: print a line when a finding opens or closes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keel.config import TrainConfig
from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import SEVERITIES, Finding
from keel.errors import Halted
from keel.run.folder import RunFolder
from keel.run.read.run import Run, State, read_metrics
from keel.terminal import tell

EVERY_STEP = 200
"""So long each step is looked at; after that, each time when a hundredth more has been logged."""


@dataclass
class Watch:
    """What has been logged and told so far. Only the main rank has one."""

    folder: RunFolder
    settings: Mapping[str, Any]
    mode: str  # quiet, tell, stop
    lines: list[Mapping[str, Any]] = field(default_factory=list)
    reported: dict[tuple[str, int], Finding] = field(default_factory=dict)  # open ones, by name and first step

    @classmethod
    def start(cls, folder: RunFolder, config: TrainConfig) -> "Watch":
        """Start where the run continues: findings that are open by then have been reported, and are named again."""
        watch = cls(folder, config.model_dump(mode="json"), config.doctor)
        if config.doctor != "quiet":
            watch.lines = read_metrics(folder.metrics)
            found = watch._open() if watch.lines else {}
            watch.reported = {key: finding for key, finding in found.items() if _is_news(finding)}
            for finding in watch.reported.values():
                _say(f"still open since step {finding.first_step}: {finding.severity} {finding.name}")
        return watch

    def look(self, step: int, metrics: Mapping[str, float]) -> Finding | None:
        """Tell what is new. Returns the critical finding for which the run is to stop, if any."""
        if self.mode == "quiet":
            return None
        self.lines.append({"step": step, **metrics})
        if len(self.lines) > EVERY_STEP and len(self.lines) % (len(self.lines) // 100):
            return None
        now = self._open()
        for key, finding in now.items():
            before = self.reported.get(key)
            if _is_news(finding) and (before is None or _is_worse(finding, before)):
                _say(format_finding(finding))
                self.reported[key] = finding
        for name, first in self.reported.keys() - now.keys():
            _say(f"{name}, open since step {first}, is over")
            del self.reported[name, first]
        worst = (finding for finding in now.values() if finding.severity == "critical" and self.mode == "stop")
        return next(worst, None)

    def _open(self) -> dict[tuple[str, int], Finding]:
        run = Run.of_lines(self.folder.path, self.settings, self.lines, State("running"))
        return {(finding.name, finding.first_step): finding for finding in diagnose(run).findings if finding.is_open}


def _is_news(finding: Finding) -> bool:
    """What is critical, and the warnings that follow from nothing else."""
    return finding.severity == "critical" or (finding.severity == "warning" and finding.follows_from is None)


def _is_worse(finding: Finding, before: Finding) -> bool:
    return SEVERITIES.index(finding.severity) < SEVERITIES.index(before.severity)


def format_finding(finding: Finding) -> str:
    """A finding in one line."""
    change = finding.causes[0].change
    advice = f"{change.setting}: {change.to}" if change.setting else change.to
    return f"{finding.severity}: {finding.name} since step {finding.first_step}: {finding.title} -> try {advice}"


def halt_error(finding: Finding | None, step: int, folder: RunFolder) -> Halted:
    """What ends a run whose `doctor` setting is stop; the main rank knows the finding."""
    if finding is None:
        return Halted("the doctor of the main process stops the run", f"step {step}")
    what = f"{finding.name} since step {finding.first_step}: {finding.title}"
    return Halted(what, f"step {step}", f"keel doctor {folder.path}, or set doctor: tell and --resume")


def _say(what: str) -> None:
    tell(f"doctor: {what}")
