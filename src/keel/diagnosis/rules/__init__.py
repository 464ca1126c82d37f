"""All rules, in the order of the pipeline. `python -m tests.reference` writes docs/reference/findings.md."""

from keel.diagnosis.rule import Rule
from keel.diagnosis.rules import (
    collapse,
    critic,
    ended,
    hacking,
    lagging,
    learning,
    length,
    outside,
    overoptimised,
    policy,
    prompts,
    rewards,
    sampling,
    schedule,
    shifts,
    supervised,
    updates,
    value_offset,
)

POLICY_LEARNING: tuple[Rule, ...] = (
    *sampling.RULES,
    *prompts.RULES,
    *rewards.RULES,
    *shifts.RULES,
    *schedule.RULES,
    policy.ENTROPY,
    *updates.RULES,
    *value_offset.RULES,
    *critic.RULES,
    *policy.RULES,
    *length.RULES,
    *hacking.RULES,
    *lagging.RULES,
    *outside.RULES,
    *collapse.RULES,
    *overoptimised.RULES,
    *learning.RULES,
    *ended.RULES,
)
"""Rules of `keel train`. Of equally severe findings, that of the earlier rule is reported first."""

SUPERVISED: tuple[Rule, ...] = (*supervised.RULES, *ended.RULES)
"""Rules of `keel sft`, `keel reward` and `keel dpo`."""
