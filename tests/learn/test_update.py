"""One update of a policy that is a table: gradients, clips and stops, worked out by hand."""

import itertools
import math
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch

from keel.errors import Diverged
from keel.learn import update
from keel.learn.algorithms import ALGORITHMS, Algorithm, Loss
from keel.learn.guard import Guard

from .tables import Table, batch_of, updated, updater

HALF = log(0.5)
LOGITS = [1.0, 0.0, -1.0]
P = [0.66524096, 0.24472847, 0.09003057]  # their softmax
LOGP = [-0.40760596, -1.40760596, -2.40760596]


def close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_first_pass_sees_the_policy_that_sampled(name: str) -> None:
    batch = batch_of([[0, 1], [2, 0]], [[LOGP[0], LOGP[1]], [LOGP[2], LOGP[0]]], [[1.0, -2.0], [0.5, -0.1]])
    metrics, _ = updated(updater(Table(LOGITS), name), batch)
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["policy/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["policy/clipfrac"] == 0.0


def test_in_the_first_pass_ppo_follows_the_policy_gradient() -> None:
    """Tokens 0 and 1 of an even coin, advantages 1 and -1: -(A (onehot - p)) / 2 tokens."""
    batch = batch_of([[0], [1]], [[HALF], [HALF]], [[1.0], [-1.0]])
    for name in ("ppo", "a2c", "grpo", "rloo", "reinforce"):
        _, ((gradient, *_),) = updated(updater(Table([0.0, 0.0]), name), batch)
        close(gradient, [-0.5, 0.5])


@pytest.mark.parametrize("budget", [1, 4, 1000])
def test_the_loss_is_a_mean_over_tokens(budget: int) -> None:
    """[[2], [1, 1, 1]] has the mean 5 / 4, however the rows are split: not 1.5, the mean of the rows' means."""
    advantages = [[-2 / HALF, 0.0, 0.0], [-1 / HALF] * 3]
    batch = batch_of([[0], [0, 0, 0]], [[HALF] * 3] * 2, advantages)
    metrics, ((gradient, *_),) = updated(updater(Table([0.0, 0.0]), "a2c", microbatch_tokens=budget), batch)
    assert metrics["loss/policy"] == pytest.approx(1.25)
    close(gradient, [-1.25 / -HALF * 0.5, 1.25 / -HALF * 0.5])


@pytest.mark.parametrize("budget", [1, 4, 1000])
@pytest.mark.parametrize(
    ("aggregation", "loss"),
    [
        ("sequence", 1.5),  # (2 + (1 + 1 + 1) / 3) / 2 responses
        ("constant", 0.625),  # (2 + 1 + 1 + 1) / (2 responses * 4 tokens)
    ],
)
def test_the_aggregation_of_the_loss(aggregation: str, loss: float, budget: int) -> None:
    """[[2], [1, 1, 1]], and a dropped response, which counts neither as a response nor by its tokens."""
    advantages = [[-2 / HALF, 0.0, 0.0], [-1 / HALF] * 3, [9.0] * 3]
    batch = batch_of([[0], [0, 0, 0], [1, 1, 1]], [[HALF] * 3] * 3, advantages)
    batch.response_mask[2] = False
    learner = updater(Table([0.0, 0.0]), "a2c", microbatch_tokens=budget, loss_aggregation=aggregation)
    metrics, ((gradient, *_),) = updated(learner, batch)
    assert metrics["loss/policy"] == pytest.approx(loss)
    close(gradient, [loss / HALF * 0.5, -loss / HALF * 0.5])


def test_entropy_and_kl_are_aggregated_like_the_policy_loss() -> None:
    """With logits of an even coin k2 is (log 2 - log 4)^2 / 2 in row 1 and 0 in row 2: a mean of 1/2 over responses,
    and 1/4 over tokens. The entropy is at its maximum, where its gradient is 0."""
    batch = batch_of(
        [[0], [0, 0, 0]],
        [[HALF] * 3] * 2,
        [[0.0] * 3] * 2,
        ref_logprobs=[[2 * HALF, 0.0, 0.0], [HALF] * 3],
    )
    settings = {"kl_in": "loss", "kl_estimator": "k2", "entropy_coef": 0.5}
    for aggregation, share in (("token", 0.25), ("sequence", 0.5), ("constant", 0.125)):
        learner = updater(Table([0.0, 0.0]), "a2c", loss_aggregation=aggregation, **settings)
        metrics, ((gradient,),) = updated(learner, batch, kl_coef=1.0)
        assert metrics["loss/kl"] == pytest.approx(share * HALF**2 / 2)
        close(gradient, [share * -HALF * 0.5, share * HALF * 0.5])


@pytest.mark.parametrize("budget", [1, 1000])
@pytest.mark.parametrize(
    ("advantage", "loss", "clipped", "slope"),
    [
        (1.0, -0.75, 2 / 3, 0.0),  # min(2 A, 1.5 A) = 1.5, in one of two responses
        (-1.0, 1.0, 0.0, 1.0),
    ],
)
def test_the_ratio_of_a_response(advantage: float, loss: float, clipped: float, slope: float, budget: int) -> None:
    """GSPO: token ratios 4 and 1 make a ratio of 2 = sqrt(4 * 1) for the response. The second has a ratio of 1 and no
    advantage. Of two heads of an even coin, s_i grad log pi(y_i) / T_i is 2 (onehot - p)."""
    batch = batch_of([[0, 0], [0]], [[HALF - log(4.0), HALF], [HALF, 0.0]], [[advantage] * 2, [0.0, 0.0]])
    learner = updater(
        Table([0.0, 0.0]),
        "grpo",
        ratio_level="sequence",
        loss_aggregation="sequence",
        clip_range_high=0.5,
        microbatch_tokens=budget,
    )
    metrics, ((gradient,),) = updated(learner, batch)
    assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-5)
    assert metrics["policy/clipfrac"] == pytest.approx(clipped)
    assert metrics["policy/ratio"] == pytest.approx(2.0)  # (4 + 1 + 1) / 3, of the tokens
    close(gradient, [0.5 * slope, -0.5 * slope])


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"), [(5.0, -1.0, 1.2), (5.0, 1.0, 1.2), (0.5, 1.0, 0.8), (1.1, 1.0, 1.1)]
)
def test_a_clipped_importance_weight(ratio: float, advantage: float, weight: float) -> None:
    """CISPO: the gradient of a token outside the range is limited, and not removed."""
    batch = batch_of([[0]], [[HALF - log(ratio)]], [[advantage]])
    metrics, ((gradient,),) = updated(updater(Table([0.0, 0.0]), "grpo", clip_target="weight"), batch)
    assert metrics["loss/policy"] == pytest.approx(-weight * advantage * HALF, rel=1e-5)
    assert metrics["policy/clipfrac"] == float(weight != ratio)
    close(gradient, [-0.5 * weight * advantage, 0.5 * weight * advantage])


@pytest.mark.parametrize(("estimator", "slope"), [("k2", 0.69100633), ("k3", 0.49892826)])
def test_the_gradient_of_a_kl_in_the_loss(estimator: str, slope: float) -> None:
    """d = log p - log 1/3 = .691: the gradient of k2 is d, that of k3 1 - exp(-d), times onehot - p."""
    batch = batch_of([[0]], [[LOGP[0]]], [[0.0]], ref_logprobs=[[log(1 / 3)]])
    metrics, ((gradient, *_),) = updated(
        updater(Table(LOGITS), kl_in="loss", kl_estimator=estimator), batch, kl_coef=0.5
    )
    close(gradient, [0.5 * slope * (1 - P[0]), -0.5 * slope * P[1], -0.5 * slope * P[2]])
    k2, k3 = 0.69100633**2 / 2, math.exp(-0.69100633) - 1 + 0.69100633
    assert metrics["loss/kl"] == pytest.approx(0.5 * (k2 if estimator == "k2" else k3), rel=1e-5)


def test_a_kl_in_the_reward_adds_no_loss() -> None:
    batch = batch_of([[0]], [[LOGP[0]]], [[0.0]], ref_logprobs=[[log(1 / 3)]])
    metrics, ((gradient, *_),) = updated(updater(Table(LOGITS)), batch, kl_coef=0.5)
    close(gradient, [0.0, 0.0, 0.0])
    assert "loss/kl" not in metrics


def test_the_entropy_bonus_spreads_the_policy() -> None:
    """dH / dz = -p (log p + H), H = .8323956."""
    batch = batch_of([[0]], [[LOGP[0]]], [[0.0]])
    learner = updater(Table(LOGITS), entropy_coef=0.5)
    metrics, ((gradient, *_),) = updated(learner, batch)
    assert metrics["policy/entropy"] == pytest.approx(0.8323956)
    close(gradient, [0.5 * p * (logp + 0.8323956) for p, logp in zip(P, LOGP, strict=True)])
    assert updated(learner, batch)[0]["policy/entropy"] > 0.84


@pytest.mark.parametrize(
    ("value", "loss", "slope"), [(1.0, 0.125, 0.5), (0.5, 0.32, 0.0), (-1.0, 2.0, -2.0), (0.1, 0.405, -0.9)]
)
def test_the_value_loss_and_its_clip(value: float, loss: float, slope: float) -> None:
    """Stored value 0, clip range .2, returns 1 (and .5 in the first case)."""
    batch = batch_of([[0]], [[HALF]], [[0.0]], values=[[0.0]], returns=[[0.5 if value == 1.0 else 1.0]])
    metrics, ((_, gradient),) = updated(updater(Table([0, 0], [value, 9.0]), value_clip_range=0.2), batch)
    assert metrics["loss/value"] == pytest.approx(loss)
    close(gradient, [0.5 * slope, 0.0])  # value_coef .5; the value after the last token has no loss


def test_the_value_loss_without_a_clip() -> None:
    batch = batch_of([[0]], [[HALF]], [[0.0]], values=[[0.0]], returns=[[1.0]])
    metrics, ((_, gradient),) = updated(updater(Table([0, 0], [0.5, 9.0]), value_coef=2.0), batch)
    assert metrics["loss/value"] == pytest.approx(0.125)
    close(gradient, [-1.0, 0.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "clipped", "slope"),
    [
        (1.5, 1.0, None, -1.2, 1.0, 0.0),
        (0.5, 1.0, None, -0.5, 0.0, -0.5),
        (1.5, -1.0, None, 1.5, 0.0, 1.5),
        (0.5, -1.0, None, 0.8, 1.0, 0.0),
        (5.0, -1.0, None, 5.0, 0.0, 5.0),
        (5.0, -1.0, 3.0, 3.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_clipped_surrogate(
    name: str, ratio: float, advantage: float, dual_clip: float | None, loss: float, clipped: float, slope: float
) -> None:
    batch = batch_of([[0]], [[HALF - log(ratio)]], [[advantage]])
    metrics, ((gradient, *_),) = updated(updater(Table([0.0, 0.0]), name, dual_clip=dual_clip), batch)
    assert metrics["policy/ratio"] == pytest.approx(ratio, rel=1e-5)
    assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-5)
    assert metrics["policy/clipfrac"] == clipped
    assert metrics["policy/approx_kl"] == pytest.approx(ratio - 1 - log(ratio), rel=1e-5)
    close(gradient, [0.5 * slope, -0.5 * slope])


def test_the_clip_range_may_be_wider_above() -> None:
    batch = batch_of([[0], [0]], [[HALF - log(1.25)], [HALF - log(1.35)]], [[1.0], [1.0]])
    metrics, _ = updated(updater(Table([0.0, 0.0]), clip_range_high=0.3), batch)
    assert metrics["policy/clipfrac"] == 0.5
    assert metrics["loss/policy"] == pytest.approx(-(1.25 + 1.3) / 2)


def test_algorithms_without_a_clip_have_no_bound() -> None:
    batch = batch_of([[0]], [[HALF - log(5.0)]], [[-1.0]])
    _, ((gradient, *_),) = updated(updater(Table([0.0, 0.0]), "rloo"), batch)
    close(gradient, [0.5, -0.5])


def drifting(limit: float | None) -> dict[str, float]:
    """Each of up to four epochs moves the two logits by about .5 each, in opposite directions."""
    batch = batch_of([[0], [0]], [[HALF], [HALF]], [[1.0], [1.0]])
    settings = {"update_epochs": 4, "max_approx_kl": limit, "clip_range_high": 10.0}
    return updated(updater(Table([0.0, 0.0]), rate=0.5, **settings), batch)[0]


def test_epochs_end_when_the_policy_has_gone_far() -> None:
    assert drifting(None)["policy/update_epochs"] == 4
    assert drifting(100.0)["policy/update_epochs"] == 4
    assert drifting(1e-3)["policy/update_epochs"] == 2  # what the first epoch did is seen by the second


def test_in_warm_up_only_the_critic_moves() -> None:
    batch = batch_of([[0], [1]], [[HALF], [HALF]], [[1.0], [-1.0]], returns=[[1.0], [1.0]])
    model = Table([0.0, 0.0], [0.0, 0.0])
    metrics, ((policy, critic),) = updated(updater(model), batch, step_scale=0.0)
    assert not policy.any()
    close(critic, [-0.5, 0.0])
    assert model.policy.weight.tolist() == [[0.0], [0.0]]
    assert model.critic is not None
    assert model.critic.weight[0] > 0.05
    assert "policy/grad_norm" not in metrics


def test_a_separate_critic_gives_no_gradient_to_the_policy() -> None:
    batch = batch_of([[0], [1]], [[HALF], [HALF]], [[0.0], [0.0]], returns=[[1.0], [-3.0]])
    metrics, ((policy, critic),) = updated(updater(Table([0.0, 0.0], [0.0, 0.0])), batch)
    assert policy.tolist() == [0.0, 0.0]
    close(critic, [0.5, 0.0])
    assert metrics["policy/grad_norm"] == 0.0


def test_gradients_of_policy_and_critic_are_clipped_each_for_itself() -> None:
    batch = batch_of([[0]], [[HALF]], [[1.0]], returns=[[8.0]])
    metrics, ((policy, critic),) = updated(updater(Table([0.0, 0.0], [0.0, 0.0]), max_grad_norm=0.5), batch)
    assert metrics["policy/grad_norm"] == pytest.approx(0.5**0.5)  # [-.5, .5], as it was before
    assert metrics["critic/grad_norm"] == pytest.approx(4.0)
    assert float(policy.norm()) == pytest.approx(0.5, rel=1e-5)
    assert float(critic.norm()) == pytest.approx(0.5, rel=1e-5)


def test_of_large_models_one_gradient_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic is updated after the policy, with the same result."""
    batch = batch_of([[0], [1]], [[HALF], [HALF]], [[1.0], [-1.0]], returns=[[1.0], [-3.0]])
    together, apart = Table([0.0, 0.0], [0.0, 0.0]), Table([0.0, 0.0], [0.0, 0.0])
    metrics, _ = updated(updater(together), batch)
    monkeypatch.setattr(update, "SMALL", 0)
    metrics_apart, ((policy, none), (nothing, critic)) = updated(updater(apart), batch)
    close(policy, [-0.5, 0.5])
    close(critic, [0.5, 0.0])
    assert not none.any()
    assert not nothing.any()
    assert metrics_apart == metrics
    assert all(torch.equal(*pair) for pair in zip(apart.parameters(), together.parameters(), strict=True))


@pytest.mark.parametrize("small", [0, 100])
def test_a_faulty_critic_is_skipped_alone(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "SMALL", small)
    batch = batch_of([[0]], [[HALF]], [[1.0]], returns=[[math.inf]])
    model = Table([0.0, 0.0], [0.0, 0.0])
    metrics, _ = updated(replace(updater(model), guard=Guard("skip")), batch)
    assert metrics["update/skipped"] == 1.0
    assert model.policy.weight[0] > 0.05
    assert model.critic is not None
    assert model.critic.weight.tolist() == [[0.0], [0.0]]


def test_small_gradients_are_not_made_larger() -> None:
    batch = batch_of([[0]], [[HALF]], [[0.01]])
    _, ((policy,),) = updated(updater(Table([0.0, 0.0]), max_grad_norm=0.5), batch)
    close(policy, [-0.005, 0.005])


def test_the_learning_rate_falls_to_one_part_in_all_updates() -> None:
    """Two steps of two epochs of two minibatches: 8/8, 7/8, ... 1/8 of the rate."""
    batch = batch_of([[0], [1]], [[HALF], [HALF]], [[1.0], [-1.0]])
    learner = updater(Table([0.0, 0.0]), schedule="linear", total_steps=2, update_epochs=2, minibatch_size=1)
    rates = [updated(learner, batch, step=step)[0]["policy/learning_rate"] for step in (1, 2)]
    assert rates == pytest.approx([0.1 * (8 + 7 + 6 + 5) / 32, 0.1 * (4 + 3 + 2 + 1) / 32])
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


def rows_seen(**settings: Any) -> list[list[int]]:
    """The rows of each optimizer step; row n has the advantage n."""
    seen: list[list[int]] = []

    def loss(given: Loss) -> torch.Tensor:
        seen.append(sorted(round(value) for value in given.advantages.tolist()))
        return ALGORITHMS["ppo"].policy_loss(given)

    learner = updater(Table([0.0, 0.0]), rate=1e-6, update_epochs=3, minibatch_size=4)
    object.__setattr__(learner, "algorithm", Algorithm(ALGORITHMS["ppo"].advantages, loss, True, False))
    updated(learner, batch_of([[0]] * 12, [[HALF]] * 12, [[float(n)] for n in range(12)]), **settings)
    return seen


def test_each_epoch_visits_every_row_once_in_a_new_order() -> None:
    seen = rows_seen()
    assert [len(rows) for rows in seen] == [4] * 9
    epochs = [seen[start : start + 3] for start in (0, 3, 6)]
    assert all(sorted(itertools.chain(*epoch)) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_depends_on_seed_and_step_alone() -> None:
    assert rows_seen() == rows_seen()
    assert rows_seen() != rows_seen(seed=1)
    assert rows_seen() != rows_seen(step=2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_stop_before_the_step(bad: float) -> None:
    model = Table([0.0, 0.0], [0.0, 0.0])
    learner = updater(model)
    with pytest.raises(Diverged, match="the loss is not finite"):
        updated(learner, batch_of([[0]], [[HALF]], [[1.0]], returns=[[bad]]))
    assert model.policy.weight.tolist() == [[0.0], [0.0]]
    assert not learner.optimizer.state_dict()["state"]


def test_a_step_in_which_all_answers_were_dropped_teaches_nothing() -> None:
    model = Table([0.0, 0.0])
    batch = batch_of([[0]], [[HALF]], [[1.0]])
    batch.response_mask.fill_(False)
    metrics, gradients = updated(updater(model), batch)
    assert gradients == []
    assert math.isnan(metrics["loss/policy"])
    assert model.policy.weight.tolist() == [[0.0], [0.0]]


def test_dropped_answers_do_not_count() -> None:
    batch = batch_of([[0], [1]], [[HALF], [HALF]], [[1.0], [0.0]])
    batch.response_mask[1] = False
    _, ((gradient,),) = updated(updater(Table([0.0, 0.0])), batch)
    close(gradient, [-0.5, 0.5])


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_weight_multiplies_the_policy_loss_alone(name: str) -> None:
    """Token 0 of an even coin, advantage 1, weight 1.5: -1.5 (onehot - p) - and the entropy bonus is not weighted."""
    batch = batch_of([[0]], [[HALF]], [[1.0]], weights=[[1.5]], values=[[0.0]], returns=[[1.0]])
    _, (gradients,) = updated(updater(Table([0.0, 0.0], [0.0, 0.0]), name, entropy_coef=0.5), batch)
    close(gradients[0], [-0.75, 0.75])
    close(gradients[1], [-0.5, 0.0])  # value_coef .5 times (V - R), not weighted
