"""What only the whole system can get wrong: checked on tiny models, with the setup that a run builds."""

import dataclasses
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from keel.core.losses import clipped_policy_loss
from keel.data.batches import ScoredRollouts
from keel.learn.shaping import ScoreStatistics, Shaping
from keel.rollout.sampler import sample_rollouts
from keel.rollout.score import score
from keel.training.setup import TrainingSetup

from .system import experience, plain_logits, setup_of, targets_of, uniforms_for

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # one float32 computation against another


@pytest.fixture(params=["tiny_policy", "tiny_gpt2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_before_the_first_update_nothing_has_moved(folder: Path, batch_size: int, sharing: str) -> None:
    """Prompts of unequal length, sampled with a cache at temperature .7, analysed without a cache."""
    setup = setup_of(folder, batch_size=batch_size, critic_sharing=sharing)
    scored, batch = experience(setup)
    mask = batch.response_mask
    torch.testing.assert_close(batch.logprobs[mask], scored.rollouts.logprobs[mask], **CLOSE)
    torch.testing.assert_close(batch.ref_logprobs, batch.logprobs, **CLOSE)
    metrics = setup.updater.update(batch, step=1, kl_coef=0.1, seed=0)
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["policy/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["policy/clipfrac"] == 0
    assert metrics["loss/policy"] == pytest.approx(0.0, abs=1e-6)  # minus the mean of the whitened advantages


def test_stored_logprobs_are_those_of_the_tempered_model(folder: Path) -> None:
    """Policy and reference alike, against plain transformers on each answer alone; at temperature 1 none could tell."""
    setup = setup_of(folder)
    batch = experience(setup)[1]
    for row in range(batch.size):
        prompt = batch.prompt_tokens[row][batch.prompt_mask[row]].tolist()
        reply = batch.response_tokens[row][batch.response_mask[row]]
        logits = plain_logits(setup.actor_critic.policy, [*prompt, *reply.tolist()])[len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(1, reply.unsqueeze(1)).squeeze(1).float()
        torch.testing.assert_close(batch.logprobs[row, : len(reply)], expected, **CLOSE)
        torch.testing.assert_close(batch.ref_logprobs[row, : len(reply)], expected, **CLOSE)


def weights_after_one_update(folder: Path, name: str) -> torch.Tensor:
    """A large eps makes the optimizer's step nearly proportional to the gradient, so that it shows every difference."""
    setup = setup_of(folder, name, optim_eps=1.0)
    batch = experience(setup)[1]
    before = torch.cat([p.detach().flatten().clone() for p in setup.actor_critic.policy_parameters()])
    setup.updater.update(batch, step=1, kl_coef=0.1, seed=0)
    return torch.cat([p.detach().flatten() for p in setup.actor_critic.policy_parameters()]) - before


def test_the_first_ppo_update_is_a2cs(folder: Path) -> None:
    ppo, a2c = weights_after_one_update(folder, "ppo"), weights_after_one_update(folder, "a2c")
    assert ppo.norm() > 0
    assert (ppo - a2c).norm() < 1e-4 * ppo.norm()


def test_the_kl_enters_the_reward_as_k1(tiny_policy: Path) -> None:
    """Rewards token by token after the policy has moved, with a coefficient of .1."""
    setup = setup_of(tiny_policy)
    setup.updater.update(experience(setup)[1], step=1, kl_coef=0.1, seed=0)
    scored, batch = experience(setup, step=2)
    k1 = batch.logprobs - batch.ref_logprobs
    assert k1.abs().max() > 0.01
    expected = -0.1 * k1
    for row, length in enumerate(batch.response_mask.sum(1).tolist()):
        expected[row, length - 1] += scored.scores[row]
    torch.testing.assert_close(batch.rewards, expected.masked_fill(~batch.response_mask, 0.0), **CLOSE)


def test_advantages_are_whitened_over_the_counted_tokens(tiny_policy: Path) -> None:
    batch = experience(setup_of(tiny_policy, batch_size=16))[1]
    assert not batch.response_mask.all()
    counted = batch.advantages[batch.response_mask]
    assert counted.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert counted.var(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert batch.advantages[~batch.response_mask].eq(0).all()


def test_the_first_values_are_the_mean_return(folder: Path) -> None:
    """So the advantages are those of V = m: the score - m at the end, and 0.72 A_{t+1} - 0.1 m before."""
    setup = setup_of(folder, algorithm_whiten_advantages=False, algorithm_gamma=0.9, algorithm_gae_lambda=0.8)
    scored, batch = experience(setup)
    rows = list(zip(batch.response_mask.sum(1).tolist(), scored.scores.tolist(), strict=True))
    mean = statistics.fmean(0.9**back * score for length, score in rows for back in range(length))
    assert batch.values[batch.response_mask].tolist() == pytest.approx([mean] * sum(length for length, _ in rows))
    for row, (length, value) in enumerate(rows):
        expected = [value - mean]
        while len(expected) < length:
            expected.insert(0, 0.72 * expected[0] - 0.1 * mean)
        assert batch.advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_critics_gradient_stays_in_the_critic(folder: Path) -> None:
    setup = setup_of(folder)
    scored, _ = experience(setup)
    torch.nn.init.normal_(setup.actor_critic.critic.score.weight)
    values = setup.actor_critic.analyze(scored.rollouts, 0.7).values
    values.square().sum().backward()
    assert all(p.grad is None for p in setup.actor_critic.policy_parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in setup.actor_critic.critic_parameters())


@pytest.mark.parametrize(("penalty", "expected"), [(0.0, [0.7, 0.7]), (1.0, [0.7, -0.3])])
def test_a_missing_end_costs_the_penalty(tiny_policy: Path, penalty: float, expected: list[float]) -> None:
    setup = setup_of(tiny_policy)
    scored = ended_and_truncated(setup)
    same = dataclasses.replace(scored, scores=torch.tensor([0.7, 0.7]))
    shaped = Shaping(missing_eos_penalty=penalty, clip=None, normalize="none").token_scores(same, ScoreStatistics())
    assert shaped.tolist() == [[0.0, 0.0, pytest.approx(expected[0])], [0.0, 0.0, pytest.approx(expected[1])]]


def ended_and_truncated(setup: TrainingSetup) -> ScoredRollouts:
    """Two answers of three tokens to one prompt; only the first has its end."""
    replies = [(5, 6, 2), (5, 6, 7)]
    prompts = [setup.prompts[1]] * 2
    policy = setup.actor_critic.policy
    uniforms = torch.tensor([uniforms_for(policy, prompts[0].tokens, reply, 0.7) for reply in replies])
    rollouts = sample_rollouts(policy, prompts, setup.tokenizer, uniforms, setup.end_ids, 0.7)
    assert rollouts.response_tokens.tolist() == [list(reply) for reply in replies]
    assert rollouts.truncated.tolist() == [False, True]
    return score(rollouts, setup.scorers, setup.tokenizer)


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
def test_what_follows_a_cut_is_nothing_or_the_critics_word(tiny_policy: Path, truncation: str, tmp_path: Path) -> None:
    """With gamma = lambda = 1 the first return is the score, plus V(whole answer) where that is bootstrapped. The
    values are checked against the critic loaded as a plain classifier."""
    settings = {"whiten_advantages": False, "gae_lambda": 1.0, "kl_coef": 0.0, "truncation": truncation}
    setup = setup_of(tiny_policy, **{f"algorithm_{key}": value for key, value in settings.items()})
    critic = setup.actor_critic.critic
    torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(0))
    critic.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    scored = ended_and_truncated(setup)
    batch = targets_of(setup, scored)

    whole = torch.cat([batch.prompt_tokens, batch.response_tokens], dim=1)
    width = batch.prompt_tokens.shape[1]
    with torch.no_grad():
        before = [classifier(input_ids=whole[:, : width + t]).logits[:, 0] for t in range(4)]
    offset = setup.actor_critic.value_units.offset
    assert abs(offset) > 0.01
    torch.testing.assert_close(batch.values, torch.stack(before[:3], dim=1) + offset, **CLOSE)
    after_the_cut = before[3][1] + offset if truncation == "bootstrap" else torch.tensor(0.0)
    expected = torch.stack([scored.scores[0], scored.scores[1] + after_the_cut])
    assert before[3][1].abs() > 0.01
    torch.testing.assert_close(batch.returns[:, 0], expected, **CLOSE)
    torch.testing.assert_close(batch.advantages[:, 0], expected - before[0] - offset, **CLOSE)


def test_the_end_token_learns(folder: Path) -> None:
    """An answer that is nothing but its end: a good score makes ending likelier. The optimum hides a mistake here."""
    setup = setup_of(folder, "a2c", batch_size=2)
    policy, prompt = setup.actor_critic.policy, setup.prompts[1]
    uniforms = torch.tensor([uniforms_for(policy, prompt.tokens, reply, 0.7) for reply in [(2, 2), (5, 6)]])
    rollouts = sample_rollouts(policy, [prompt] * 2, setup.tokenizer, uniforms, setup.end_ids, 0.7)
    assert rollouts.lengths.tolist() == [1, 2]
    scored = score(rollouts, setup.scorers, setup.tokenizer)
    better_to_end = dataclasses.replace(scored, scores=torch.tensor([1.0, -1.0]))
    before = setup.actor_critic.analyze(rollouts, 0.7).logprobs.detach()
    setup.updater.update(targets_of(setup, better_to_end), step=1, kl_coef=0.1, seed=0)
    after = setup.actor_critic.analyze(rollouts, 0.7).logprobs.detach()
    assert after[0, 0] > before[0, 0] + 1e-3
    assert after[1].sum() < before[1].sum() - 1e-3


def test_the_update_uses_the_clipped_loss_of_core(tiny_policy: Path) -> None:
    """Stored log-probs moved by hand: the reported policy loss is the mean of core's over the counted tokens."""
    setup = setup_of(tiny_policy)
    batch = experience(setup)[1]
    shift = torch.linspace(-0.5, 0.5, batch.logprobs.numel()).view_as(batch.logprobs)
    moved = dataclasses.replace(batch, logprobs=batch.logprobs - shift)
    loss = clipped_policy_loss(batch.logprobs, moved.logprobs, batch.advantages, 0.2, 0.2)[batch.response_mask].mean()
    metrics = setup.updater.update(moved, step=1, kl_coef=0.1, seed=0)
    assert metrics["loss/policy"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["policy/clipfrac"] > 0.05
