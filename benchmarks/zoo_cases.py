"""The runs of the zoo: the fault of each, how it is induced, and what the doctor should report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from zoo_faults import Drift, Fault, failing, hot_sampler, less_for_an_end, more_for_a_phrase, noise, rescored, scaled

from keel.learn.shaping import ScoreStatistics

STEPS = 40
BY_SEED = ("ppo", "a2c")
RATES = {"ppo": 3e-4, "a2c": 1e-3, "reinforce": 1e-3, "rloo": 1e-3, "grpo": 1e-3}
DEVIATION = 1.5  # of the reward models' scores, about


@dataclass(frozen=True)
class Case:
    """One run. `changes` are settings (sections are merged), with placeholders {world} and {functions} for paths."""

    expected: tuple[str, ...]  # findings, any of which is right; none for a healthy run
    changes: Mapping[str, Any] = field(default_factory=dict)
    judge: str = "reward"  # the reward model, or a function
    held_out: Literal["always", "even seeds", "never"] = "always"
    algorithms: tuple[str, ...] = BY_SEED  # taken in turn by the seeds
    rate: float = 1.0  # times the algorithm's learning rate
    weight: float = 1.0  # of the judge
    fault: Fault | None = None
    statistics: ScoreStatistics | None = None  # taken for those of the start

    def algorithm(self, seed: int) -> str:
        return self.algorithms[seed % len(self.algorithms)]

    def has_second(self, seed: int) -> bool:
        return self.held_out == "always" or (self.held_out == "even seeds" and seed % 2 == 0)


KL_ZERO: dict[str, Any] = {"algorithm": {"kl_coef": 0.0}, "optim": {"schedule": "constant"}}
THEN_GRPO, THEN_RLOO, GRPO_EARLY = (
    ("ppo", "a2c", "ppo", "grpo"),
    ("ppo", "a2c", "ppo", "rloo"),
    ("ppo", "grpo", "ppo", "a2c"),
)

SICK: dict[str, Case] = {
    "kl-zero": Case(("reward-hacking", "over-optimisation"), KL_ZERO, judge="few"),
    "huge-lr": Case(("updates-too-large",), rate=30.0, algorithms=THEN_GRPO),
    "tiny-lr": Case(("updates-too-small",), {"optim": {"learning_rate": 1e-8}}, algorithms=THEN_RLOO),
    "huge-kl": Case(("kl-too-tight",), {"algorithm": {"kl_coef": 30.0}}, algorithms=GRPO_EARLY),
    "dead-critic": Case(("critic-not-learning",), {"optim": {"critic_learning_rate": 1e-12}}),
    "sign-error": Case(("reward-inverted",), weight=-1.0, algorithms=THEN_GRPO),
    "length-lover": Case(("length-exploitation",), judge="length", held_out="even seeds"),
    "no-ends": Case(("missing-ends",), fault=rescored(lambda: less_for_an_end(3.0))),
    "constant-reward": Case(("no-signal",), judge="constant"),
    "temperature-mismatch": Case(("sampler-mismatch",), fault=hot_sampler(1.3)),
    "wrong-reference": Case(("wrong-reference",), {"reference": "{world}/pretrain/model"}, algorithms=THEN_RLOO),
    "stale-normaliser": Case(
        ("stale-normaliser",),
        {"reward": {"normalize": "reference"}},
        statistics=ScoreStatistics(count=256.0, mean=40.0, squares=256 * 0.05**2),
    ),
    "one-prompt": Case(("prompts-repeated",), {"prompts": {"path": "{world}/data/one.jsonl"}}),
    "scale-jump": Case(
        ("reward-shift",), fault=rescored(lambda: scaled(8.0, round(0.3 * STEPS) + 1)), algorithms=THEN_RLOO
    ),
    "offset-drift": Case(("reward-shift",), fault=rescored(lambda: Drift(0.25, round(0.1 * STEPS) + 1))),
    "failing-scorer": Case(
        ("reward-failures",),
        {"reward": {"on_failure": "drop"}},
        fault=rescored(lambda: failing(0.3)),
        algorithms=GRPO_EARLY,
    ),
    "exploit": Case(("reward-hacking",), fault=rescored(lambda: more_for_a_phrase(12.0))),
    "kl-zero-blind": Case(
        ("reward-hacking", "reward-out-of-range"),
        {**KL_ZERO, "reference": "{world}/sft/model"},
        judge="few",
        held_out="never",
    ),
    "many-epochs": Case(
        ("updates-too-large",),
        {"algorithm": {"update_epochs": 24}, "optim": {"learning_rate": 1e-3}},
        algorithms=("ppo",),
    ),
    "short-limit": Case(
        ("missing-ends",),
        {"rollout": {"max_response_tokens": 8}, "reward": {"missing_eos_penalty": 0.0}},
        algorithms=THEN_RLOO,
    ),
    "coarse-reward": Case(("no-signal",), judge="coarse", algorithms=("grpo",)),
    "long-warmup": Case(("learning-rate-schedule",), {"optim": {"warmup_steps": 1_000_000}}),
    "entropy-bonus": Case(("entropy-runaway",), {"algorithm": {"entropy_coef": 1.0}}),
    "kl-runaway": Case(
        ("kl-runaway", "updates-too-large"),
        {"algorithm": {"kl_coef": 0.001}, "optim": {"learning_rate": 3e-3}},
        fault=rescored(lambda: noise(2 * DEVIATION), noisy=True),
    ),
}

HEALTHY: dict[str, Case] = {
    **{f"healthy-{name}": Case((), algorithms=(name,)) for name in RATES},
    "healthy-segments": Case((), {"reward": {"segments": "sentence"}}, algorithms=("ppo",)),
    "healthy-normalised": Case((), {"reward": {"normalize": "running"}}, algorithms=("a2c",)),
}

CASES = {**SICK, **HEALTHY}


def names_of(seed: int) -> list[str]:
    """Return the cases of a seed: one of the last two healthy ones, and the most expensive one for one seed only."""
    left_out = {"healthy-normalised" if seed % 2 == 0 else "healthy-segments"}
    return [name for name in CASES if name not in left_out | ({"many-epochs"} if seed else set())]
