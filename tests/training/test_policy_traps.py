"""Settings whose gradient is not that of the objective are refused, and what teaches nothing moves nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keel import kernels
from keel.config import TrainConfig, parse
from keel.errors import ConfigError
from keel.run.folder import RunFolder

from ..runs import settings, train


def read(changes: dict[str, Any]) -> TrainConfig:
    return parse(TrainConfig, settings(Path("model"), Path("run"), changes))


@pytest.mark.parametrize("name", ["a2c", "reinforce", "rloo"])
def test_a_loss_without_a_ratio_takes_one_pass(name: str) -> None:
    with pytest.raises(ConfigError, match="update_epochs"):
        read({"algorithm.name": name, "algorithm.update_epochs": 4})
    assert read({"algorithm.name": name, "algorithm.update_epochs": None}).algorithm.update_epochs == 1


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_clipped_loss_may_take_several_passes(name: str) -> None:
    assert read({"algorithm.name": name, "algorithm.update_epochs": 4}).algorithm.update_epochs == 4


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_estimators_that_are_wrong_in_the_reward(estimator: str) -> None:
    with pytest.raises(ConfigError, match="kl_estimator"):
        read({"algorithm.kl_in": "reward", "algorithm.kl_estimator": estimator})
    assert read({"algorithm.kl_in": "loss", "algorithm.kl_estimator": estimator}).algorithm.kl_estimator == estimator


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_a_critic_warm_up_that_leaves_no_step(name: str) -> None:
    with pytest.raises(ConfigError, match=r"critic\.warmup_steps"):
        read({"algorithm.name": name, "steps": 3, "critic.warmup_steps": 3})
    assert read({"algorithm.name": name, "steps": 3, "critic.warmup_steps": 2}).critic.warmup_steps == 2
    assert read({"algorithm.name": "grpo", "steps": 3, "critic.warmup_steps": 3}).steps == 3  # it has no critic


def test_the_estimator_fits_the_place_by_default() -> None:
    assert read({"algorithm.kl_in": "reward"}).algorithm.kl_estimator == "k1"
    assert read({"algorithm.kl_in": "loss"}).algorithm.kl_estimator == "k2"


@pytest.mark.parametrize(("warmup", "warned"), [(1, False), (2, True), (100, True)])
def test_a_learning_rate_warm_up_longer_than_the_run(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], warmup: int, warned: bool
) -> None:
    """Two steps of one update each."""
    train(tiny_policy, tmp_path / "run", {"algorithm.name": "a2c", "steps": 2, "optim.warmup_steps": warmup})
    assert ("optim.warmup_steps" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(("name", "size", "warned"), [("a2c", 4, True), ("a2c", None, False), ("ppo", 4, False)])
def test_minibatches_of_a_loss_without_a_ratio(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, size: int | None, warned: bool
) -> None:
    changes = {"algorithm.name": name, "algorithm.minibatch_size": size, "steps": 1}
    train(tiny_policy, tmp_path / "run", changes)
    assert ("algorithm.minibatch_size" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm.name": "ppo"},
        {"algorithm.name": "ppo", "critic.sharing": "shared"},
        {"algorithm.name": "a2c"},
        {"algorithm.name": "reinforce"},
        {"algorithm.name": "rloo"},
        {"algorithm.name": "grpo"},
        {"algorithm.name": "grpo", "algorithm.kl_in": "loss"},
        {"algorithm.name": "grpo", "algorithm.kl_in": "loss", "algorithm.kl_estimator": "k3"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_equal_scores_move_no_weight(
    tiny_policy: Path, tmp_path: Path, changes: dict[str, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every response scores 1.0, at a rate at which rounding alone would move the policy by nats."""
    if not compiled:
        monkeypatch.setattr(kernels, "available", lambda *_, **__: False)
    rates = {"optim.learning_rate": 1e-2, "optim.critic_learning_rate": 1e-2, "steps": 3}
    output = tmp_path / "run"

    def constant(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    metrics = train(tiny_policy, output, {**rates, **changes}, scorers=[constant])
    assert [step["policy/grad_norm"] for step in metrics] == [0.0, 0.0, 0.0]
    assert [step["objective/kl"] for step in metrics] == [0.0, 0.0, 0.0]
    before = load_file(tiny_policy / "model.safetensors")
    after = load_file(RunFolder(output).policy / "model.safetensors")
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
