"""A constant in the returns that the critic has not learned is a finding; a healthy critic has none."""

from typing import Any

import numpy as np
import pytest

from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import Finding

from .runs import Lines, healthy, run_of, settings

STEP = np.arange(40)


def offset_run(values: Any, offset: float = 5.0, spread: float = 0.5) -> Lines:
    """Return a PPO run whose returns keep a mean of `offset` and a deviation of `spread`."""
    random = np.random.default_rng(0)
    columns = healthy(0)
    scores = offset + 0.02 * random.standard_normal(40)
    columns |= {name: scores.copy() for name in ("objective/scores", "objective/shaped_scores", "critic/returns")}
    columns |= {f"objective/scores_{name}": scores + shift * spread
                for name, shift in (("low", -1.3), ("median", 0.0), ("high", 1.2))}  # fmt: skip
    for name in ("objective/scores_std", "objective/shaped_scores_std", "critic/returns_std"):
        columns[name] = np.full(40, spread)
    columns["critic/values"] = np.broadcast_to(values, 40).astype(float)
    columns["critic/advantages_std"] = spread * (1.05 + 0.02 * random.standard_normal(40))
    columns["critic/explained_variance"] = 1 - (columns["critic/advantages_std"] / spread) ** 2
    return columns


def found_in(columns: Lines, **given: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(run_of(columns, settings(**given))).findings}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_values_that_rise_slowly_from_0_are_the_root_cause(sign: float) -> None:
    columns = offset_run(sign * 0.02 * STEP, offset=sign * 5.0)
    diagnosis = diagnose(run_of(columns, settings()))
    first = diagnosis.findings[0]
    assert (first.name, first.severity, first.first_step, first.is_open) == ("value-offset", "critical", 1, True)
    assert first.causes[0].change is not None
    assert first.causes[0].change.setting == "reward.normalize"
    following = {finding.name: finding.follows_from for finding in diagnosis.findings[1:]}
    assert set(following) >= {"critic-not-learning", "critic-lagging", "not-learning"}
    assert set(following.values()) == {"value-offset"}


def test_it_is_reported_long_before_the_end() -> None:
    run = run_of(offset_run(0.02 * STEP), settings())
    assert "value-offset" in {finding.name for finding in diagnose(run.until(10)).findings}
    assert "value-offset" not in {finding.name for finding in diagnose(run.until(4)).findings}


def test_a_later_offset_is_reported_with_its_step() -> None:
    columns = offset_run(0.0, offset=0.0)
    late = STEP >= 20
    for name in ("critic/returns", "objective/scores", "objective/shaped_scores", "objective/scores_low",
                 "objective/scores_median", "objective/scores_high"):  # fmt: skip
        columns[name] = columns[name] + 5.0 * late
    found = found_in(columns)
    assert found["value-offset"].first_step == 21
    assert found["value-offset"].follows_from == "reward-shift"


@pytest.mark.parametrize("steps_late", [0.0, 1.0, 3.0])
def test_a_critic_that_is_a_few_steps_late_is_healthy(steps_late: float) -> None:
    """With 3.0, a third of the gap remains after three steps."""
    columns = offset_run(5.0 * (1 - np.exp(-STEP / max(steps_late, 1e-9))))
    assert "value-offset" not in found_in(columns)


def test_values_that_reach_the_returns_close_the_finding() -> None:
    columns = offset_run(np.where(STEP < 15, 0.02 * STEP, 5.0))
    found = found_in(columns)["value-offset"]
    assert (found.first_step, found.is_open) == (1, False)
    assert found.last_step is not None
    assert 15 <= found.last_step <= 19


@pytest.mark.parametrize("seed", range(3))
def test_a_critic_with_the_right_mean_from_step_1_is_healthy(seed: int) -> None:
    columns = healthy(seed)
    for name in ("objective/scores", "objective/shaped_scores", "critic/returns", "objective/scores_low",
                 "objective/scores_median", "objective/scores_high", "rewards/reward"):  # fmt: skip
        columns[name] = columns[name] + 50.0
    columns["critic/values"] = columns["critic/returns"] + 0.05
    columns["loss/value"] = columns["critic/advantages_std"] ** 2 / columns["critic/returns_std"] ** 2 / 2
    assert found_in(columns) == {}


def test_an_offset_that_is_small_beside_the_spread_is_not_reported() -> None:
    assert "value-offset" not in found_in(offset_run(0.02 * STEP, offset=1.0))


def test_a_critic_in_its_warm_up_is_not_reported() -> None:
    columns = offset_run(0.02 * STEP)
    assert "value-offset" not in found_in(columns, critic={"warmup_steps": 40})


def test_algorithms_without_a_critic_have_no_offset() -> None:
    columns = {name: values for name, values in offset_run(0.0).items() if not name.startswith("critic/")}
    assert "value-offset" not in found_in(columns, algorithm__name="rloo")


def test_a_dead_critic_with_the_right_mean_is_critical() -> None:
    """All states have the same value, which is the mean return."""
    columns = healthy(0)
    columns["critic/values"] = columns["critic/returns"]
    columns["critic/advantages_std"] = columns["critic/returns_std"] * (1 + 1e-7 * np.sin(STEP))
    columns["critic/explained_variance"] = np.full(40, 1e-7)
    found = found_in(columns)["critic-not-learning"]
    assert (found.severity, found.first_step <= 6) == ("critical", True)
    assert found.causes[0].what == "the critic learns too slowly"
