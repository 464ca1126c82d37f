"""docs/reference/findings.md: what each rule of the doctor measures, its thresholds and its source."""

from collections.abc import Iterator, Sequence

from keel.diagnosis.rule import Documentation, Rule, Threshold
from keel.diagnosis.rules import POLICY_LEARNING, SUPERVISED

TRAIN, OTHERS = "`keel train`", "`keel sft`, `keel reward`, `keel dpo`"
SEVERITIES = ("notice", "warning", "critical")

INTRODUCTION = """\
# Findings

A finding is one diagnosis of `keel doctor`: rule, severity, first step, evidence, likely causes, suggested change.
[Diagnosis](../diagnosis.md) explains how findings arise and how they are ordered.
[Troubleshooting](../troubleshooting.md) leads from a symptom to a finding.

"""

TERMS = """\
## Terms

| term | meaning |
|---|---|
| window | a tenth of the run's steps, at least 3 and at most 50 |
| start, now | the mean over the first window; the mean over the last one |
| sd | deviation of a score over the responses of a step: median of a window, the largest so far |
| se | standard error of a difference of two windows' means: se(step) * sqrt(2 / window) |
| se(step) | between sd / sqrt(responses) and sd / sqrt(prompts), as the noise from step to step shows |
| KL | `objective/kl`, from the policy to the reference, in nats per response |
| held-out scorer | a scorer of weight 0: measured, not learned from |
| fall from the best | less sqrt(ln n) se, because the best of n windows is partly luck |
| patience | consecutive steps for which a rule must hold; a finding closes after twice as many without it |

sd uses the largest deviation, because scores that are alike at first (a task never solved) give no unit. The responses
to one prompt are alike, so a step tells less than as many independent responses. With few responses in a step, fewer
changes are significant and the doctor reports less.
"""


def page() -> str:
    """Return the text of the page."""
    return "".join([INTRODUCTION, *_index(), "\n", TERMS, *_sections()])


def _index() -> Iterator[str]:
    yield "| finding | of | meaning |\n|---|---|---|\n"
    for name, rules in _rules_by_name().items():
        commands = ", ".join(command for command, _ in rules)
        yield f"| [`{name}`](#{name}) | {commands} | {rules[0][1].title} |\n"


def _sections() -> Iterator[str]:
    for name, rules in _rules_by_name().items():
        yield f"\n## {name}\n\n{rules[0][1].title}\n"
        if len({id(rule) for _, rule in rules}) == 1:
            yield from _section(rules[0][1])
            continue
        for command, rule in rules:
            yield f"\n### In {command}\n"
            yield from _section(rule)


def _rules_by_name() -> dict[str, list[tuple[str, Rule]]]:
    """Return name -> (commands, rule) of each rule with this name, in the order of the pipeline."""
    by_name: dict[str, list[tuple[str, Rule]]] = {}
    for command, rules in ((TRAIN, POLICY_LEARNING), (OTHERS, SUPERVISED)):
        for rule in rules:
            by_name.setdefault(rule.name, []).append((command, rule))
    return by_name


def _section(rule: Rule) -> Iterator[str]:
    documentation = rule.documentation
    yield f"\n**Measured:** {documentation.measure}.\n\n"
    yield from _table(documentation)
    if documentation.note:
        yield f"\n{documentation.note}\n"
    steps = "1 step" if rule.patience == 1 else f"{rule.patience} steps"
    facts = [f"Stage: {rule.stage}.", f"Patience: {steps}{'; it never closes' if rule.stays_open else ''}."]
    if rule.follows:
        facts.append(f"Can follow from: {_links(rule.follows)}.")
    yield f"\n{' '.join(facts)}\n"
    yield f"\n**Source:** {documentation.source}.\n"


def _links(names: Sequence[str]) -> str:
    return ", ".join(f"[{name}](#{name})" for name in names)


def _table(documentation: Documentation) -> Iterator[str]:
    """Yield the table of thresholds, with the severities that have a bound."""
    used = [name for name in SEVERITIES if any(getattr(row, name) for row in documentation.thresholds)]
    if documentation.combine:
        yield f"{documentation.combine}\n\n"
    yield f"| quantity | {' | '.join(used)} |\n|{'---|' * (len(used) + 1)}\n"
    for row in documentation.thresholds:
        yield _row(row, used)


def _row(row: Threshold, severities: Sequence[str]) -> str:
    cells = [row.quantity, *(getattr(row, name) for name in severities)]
    return f"| {' | '.join(cells)} |\n"
