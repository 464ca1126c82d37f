"""The catalogue: every rule, what lies upstream before what it causes. docs/diagnosis.md argues each of them."""

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
"""In this order a finding is named before others that are as severe."""

SUPERVISED: tuple[Rule, ...] = (*supervised.RULES, *ended.RULES)
