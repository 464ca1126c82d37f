"""Diagnose a run: what is wrong, since which step, on what evidence, and what to change."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from keel.diagnosis.findings import SEVERITIES, Diagnosis, Finding
from keel.diagnosis.rule import Rule, rule_findings
from keel.diagnosis.rules import POLICY_LEARNING, SUPERVISED
from keel.diagnosis.rules.ended import before_first_step
from keel.run.read.run import Run

SLACK = 0.2  # of the run: so much later may a cause be noticed than what it caused
AT_ONCE = 3  # steps: so much later may it be even where it is milder


def diagnose(run: Run) -> Diagnosis:
    """Return all findings about a run. Each rule uses only data up to a step for that step."""
    last = int(run.steps[-1]) if len(run.steps) else 0
    rules = POLICY_LEARNING if run.stage == "train" else SUPERVISED
    found = [finding for rule in rules for finding in rule_findings(rule, run)] if last else before_first_step(run)
    findings, measured = tuple(order_findings(found, rules, run)), any(run.has(metric) for metric in run.columns)
    return Diagnosis(str(run.path), run.name, run.stage, run.state, last, run.planned, findings, measured)


def order_findings(findings: Sequence[Finding], rules: Sequence[Rule], run: Run) -> list[Finding]:
    """Sort findings: root causes first, then by severity, then by their order in the pipeline.

    A closed cause counts as open while one of its effects is open; other closed findings come last.
    """
    place = {rule.name: number for number, rule in enumerate(rules)}
    follows = {rule.name: () if rule.of_itself(run) else rule.follows for rule in rules}
    slack = max(AT_ONCE, SLACK * run.planned)
    explained = without_circles(
        [replace(finding, follows_from=_cause_of(finding, findings, follows, place, slack)) for finding in findings]
    )
    live = {finding.name for finding in explained if finding.is_open}
    live |= {finding.follows_from for finding in explained if finding.is_open and finding.follows_from}

    def key(finding: Finding) -> tuple[bool, bool, int, bool, int, int]:
        unseen, has_cause = finding.name not in live, finding.follows_from is not None
        severity = SEVERITIES.index(finding.severity)
        return unseen, has_cause, severity, not finding.is_open, place[finding.name], finding.first_step

    return sorted(explained, key=key)


def without_circles(findings: Sequence[Finding]) -> list[Finding]:
    """The same findings; of those that explain each other in a circle the one that was first follows from none."""
    by_step = sorted(findings, key=lambda finding: finding.first_step)
    first = {finding.name: finding for finding in reversed(by_step)}  # of each name
    for finding in by_step:
        if finding == first[finding.name] and finding.name in _chain(finding, first):
            first[finding.name] = replace(finding, follows_from=None)
    return [first[one.name] if one.first_step == first[one.name].first_step else one for one in findings]


def _chain(finding: Finding, first: Mapping[str, Finding]) -> set[str]:
    """Names of what explains a finding, of what explains this, and so on."""
    above: set[str] = set()
    name = finding.follows_from
    while name is not None and name not in above:
        above.add(name)
        name = first[name].follows_from
    return above


def _cause_of(
    finding: Finding,
    findings: Sequence[Finding],
    follows: Mapping[str, Sequence[str]],
    place: Mapping[str, int],
    slack: float,
) -> str | None:
    """The first in the catalogue of the findings that explain this one and were there shortly before it. What lies
    upstream may also be noticed a little later, and more so if it is as grave, unless each of the two could have caused
    the other."""

    def explains(other: Finding) -> bool:
        if other.severity == "notice" or (not other.is_open and _milder(other, finding)):
            return False  # what is over and milder leaves nothing worse behind
        if other.last_step is not None and other.last_step < finding.first_step - slack:
            return False
        upstream = place[other.name] < place[finding.name] and finding.name not in follows[other.name]
        late = AT_ONCE if _milder(other, finding) else slack
        return other.first_step <= finding.first_step + late if upstream else other.first_step < finding.first_step

    causes = [other.name for other in findings if other.name in follows[finding.name] and explains(other)]
    return min(causes, key=lambda name: place[name], default=None)


def _milder(one: Finding, other: Finding) -> bool:
    return SEVERITIES.index(one.severity) > SEVERITIES.index(other.severity)
