"""The values that the sampler computes for a shared critic are those of the trainer's own pass."""

from pathlib import Path
from typing import Any

import pytest
import torch

from keel.learn.targets import analyze_all
from keel.models.packed import token_states
from keel.training.trainer import PolicyTrainer

from ..runs import PROMPTS, settings, share_of_w3, train


def trainer_of(model: Path, output: Path, **changes: Any) -> PolicyTrainer:
    given = {"critic.sharing": "shared", "algorithm.truncation": "bootstrap", **changes}
    trainer = PolicyTrainer.from_config(settings(model, output, given), [share_of_w3], PROMPTS)
    head = trainer.setup.actor_critic.value_head
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, head.weight.numel()).view(head.weight.shape))
    return trainer


def test_they_are_those_of_a_full_pass(tiny_policy: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_policy, tmp_path / "run")
    actor_critic, rollouts = trainer.setup.actor_critic, trainer.sample()
    found = actor_critic.sampled_analysis(rollouts)
    assert found is not None
    expected = analyze_all(actor_critic, rollouts, 1.0, 4096)
    assert expected.values is not None
    assert expected.final_values is not None
    assert found.values is not None
    assert found.final_values is not None
    assert float(expected.values.std()) > 0.1
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-4)
    cut = rollouts.truncated
    assert bool(cut.any())
    torch.testing.assert_close(found.final_values[cut], expected.final_values[cut], rtol=1e-4, atol=1e-4)


def test_no_pass_of_the_policy_is_spent_on_them(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_policy, tmp_path / "run")
    assert trainer.state.trust_sampler
    assert trainer.setup.reference is not None
    scored, read = trainer.score(trainer.sample()), list[bool]()

    def watched(model: Any, *rest: Any) -> torch.Tensor:
        read.append(model is trainer.setup.actor_critic.policy)
        return token_states(model, *rest)

    monkeypatch.setattr("keel.models.actor_critic.token_states", watched)
    trainer.compute_targets(scored)
    assert read == [False]  # the reference


def test_a_run_learns_the_same_without_them(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"critic.sharing": "shared", "algorithm.truncation": "bootstrap"}
    with_them = train(tiny_policy, tmp_path / "with", changes)
    monkeypatch.setattr("keel.models.actor_critic.ActorCritic.sampled_analysis", lambda *_: None)
    without = train(tiny_policy, tmp_path / "without", changes)
    for ours, theirs in zip(with_them, without, strict=True):
        for name in ("objective/scores", "loss/value", "policy/grad_norm", "critic/explained_variance"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6)
