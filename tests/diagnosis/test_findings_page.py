"""The catalogue of findings is what the rules say, and each rule documents what it compares with."""

import re

import pytest

from keel.diagnosis.rule import Rule
from keel.diagnosis.rules import POLICY_LEARNING, SUPERVISED

from ..reference.findings import page

RULES = [*POLICY_LEARNING, *SUPERVISED[:-1]]  # run-ended is in both


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_is_a_sentence_a_formula_thresholds_and_a_source(rule: Rule) -> None:
    documentation = rule.documentation
    assert rule.title.endswith(".")
    assert documentation.measure
    assert documentation.source
    assert len(documentation.note.split()) <= 80
    assert bool(documentation.combine) == (len(documentation.thresholds) > 1)
    for row in documentation.thresholds:
        assert row.notice or row.warning or row.critical
        assert not any("|" in cell for cell in (row.quantity, row.notice, row.warning, row.critical))


def test_every_finding_has_one_section() -> None:
    sections = re.findall(r"^## ([a-z-]+)$", page(), re.MULTILINE)
    assert sections == list(dict.fromkeys(rule.name for rule in (*POLICY_LEARNING, *SUPERVISED)))
