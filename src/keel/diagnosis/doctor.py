"""Diagnose a run: what is wrong, since which step, on what evidence, and what to change."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from keel.diagnosis.findings import SEVERITIES, Diagnosis, Finding
from keel.diagnosis.rule import Rule, rule_findings
from keel.diagnosis.rules import POLICY_LEARNING, SUPERVISED
from keel.diagnosis.rules.ended import findings_without_steps
from keel.run.read.run import Run

SLACK = 0.2  # of the run: an upstream cause may be noticed this much later than its effect
MILDER_SLACK = 3  # steps: the same for a cause that is milder than its effect


def diagnose(run: Run) -> Diagnosis:
    """Return all findings about a run. Each rule uses only data up to a step for that step."""
    last_step = int(run.steps[-1]) if len(run.steps) else 0
    rules = POLICY_LEARNING if run.stage == "train" else SUPERVISED
    if last_step:
        unordered = [finding for rule in rules for finding in rule_findings(rule, run)]
    else:
        unordered = findings_without_steps(run)
    findings, measured = tuple(order_findings(unordered, rules, run)), any(run.has(metric) for metric in run.columns)
    return Diagnosis(str(run.path), run.name, run.stage, run.state, last_step, run.planned, findings, measured)


def order_findings(findings: Sequence[Finding], rules: Sequence[Rule], run: Run) -> list[Finding]:
    """Sort findings: root causes first, then by severity, then by their order in the pipeline.

    A closed cause counts as open while one of its effects is open; other closed findings come last.
    """
    position = {rule.name: index for index, rule in enumerate(rules)}
    follows = {rule.name: () if rule.is_root_cause(run) else rule.follows for rule in rules}
    slack = max(MILDER_SLACK, SLACK * run.planned)
    explained = break_cycles(
        [
            replace(finding, follows_from=_find_cause(finding, findings, follows, position, slack))
            for finding in findings
        ]
    )
    live = {finding.name for finding in explained if finding.is_open}
    live |= {finding.follows_from for finding in explained if finding.is_open and finding.follows_from}

    def key(finding: Finding) -> tuple[bool, bool, int, bool, int, int]:
        is_over, has_cause = finding.name not in live, finding.follows_from is not None
        severity = SEVERITIES.index(finding.severity)
        return is_over, has_cause, severity, not finding.is_open, position[finding.name], finding.first_step

    return sorted(explained, key=key)


def break_cycles(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings without cycles of explanation: the earliest finding of a cycle becomes a root cause."""
    by_step = sorted(findings, key=lambda finding: finding.first_step)
    earliest = {finding.name: finding for finding in reversed(by_step)}  # name -> its first finding
    for finding in by_step:
        if finding == earliest[finding.name] and finding.name in _explanation_chain(finding, earliest):
            earliest[finding.name] = replace(finding, follows_from=None)
    return [
        earliest[finding.name] if finding.first_step == earliest[finding.name].first_step else finding
        for finding in findings
    ]


def _explanation_chain(finding: Finding, earliest: Mapping[str, Finding]) -> set[str]:
    """Return the names of the finding's cause, of that cause's cause, and so on."""
    chain: set[str] = set()
    name = finding.follows_from
    while name is not None and name not in chain:
        chain.add(name)
        name = earliest[name].follows_from
    return chain


def _find_cause(
    finding: Finding,
    findings: Sequence[Finding],
    follows: Mapping[str, Sequence[str]],
    position: Mapping[str, int],
    slack: float,
) -> str | None:
    """Return the most upstream finding that explains this one, or None.

    A cause must have been present shortly before its effect. An upstream cause may be noticed a little later (`slack`
    if it is at least as severe), unless each of the two could have caused the other.
    """

    def explains(other: Finding) -> bool:
        if other.severity == "notice" or (not other.is_open and _is_milder(other, finding)):
            return False  # a closed, milder finding does not explain a worse one
        if other.last_step is not None and other.last_step < finding.first_step - slack:
            return False
        is_upstream = position[other.name] < position[finding.name] and finding.name not in follows[other.name]
        delay = MILDER_SLACK if _is_milder(other, finding) else slack
        if is_upstream:
            return other.first_step <= finding.first_step + delay
        return other.first_step < finding.first_step

    causes = [other.name for other in findings if other.name in follows[finding.name] and explains(other)]
    return min(causes, key=lambda name: position[name], default=None)


def _is_milder(finding: Finding, other: Finding) -> bool:
    return SEVERITIES.index(finding.severity) > SEVERITIES.index(other.severity)
