"""The catalogue: every rule, what lies upstream before what it causes. docs/diagnosis.md argues each of them."""

from keel.diagnose.rule import Rule
from keel.diagnose.rules import (
    collapse,
    critic,
    hacking,
    learning,
    overoptimised,
    policy,
    prompts,
    rewards,
    sampling,
    shifts,
    supervised,
    updates,
)

POLICY_LEARNING: tuple[Rule, ...] = (
    *sampling.RULES,
    *prompts.RULES,
    *rewards.RULES,
    *shifts.RULES,
    *updates.RULES,
    *critic.RULES,
    *policy.RULES,
    *hacking.RULES,
    *collapse.RULES,
    *overoptimised.RULES,
    *learning.RULES,
)
"""In this order a finding is named before others that are as severe."""

SUPERVISED = supervised.RULES
