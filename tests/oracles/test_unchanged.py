"""What must not change: splits and order, padding, position, batching; reference, dropout, ties."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from keel.data.batches import TrainingBatch, select_rows
from keel.learn.targets import analyze_all
from keel.models.actor_critic import ActorCritic, without_adapter
from keel.models.loading import load_causal_lm, load_tokenizer, save_model
from keel.models.reward_model import RewardModel
from keel.training.setup import TrainingSetup

from .system import experience, gradients_of, in_double, rollouts_of, setup_of, uneven

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=["tiny_policy", "tiny_gpt2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def gradient(
    folder: Path, change: Callable[[TrainingBatch], TrainingBatch] = lambda batch: batch, **settings: object
) -> Tensor:
    """The gradient of one optimizer step over eight uneven answers, the same at every call."""
    setup = in_double(setup_of(folder, **settings))
    steps = gradients_of(setup.updater, change(uneven(setup)))
    assert len(steps) == 1
    return steps[0]


def same(one: Tensor, other: Tensor) -> None:
    assert one.norm() > 1e-3
    assert (one - other).norm() < 1e-10 * one.norm()


@pytest.mark.parametrize("microbatch_tokens", [1, 20, 30])
@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_micro_batches_never_change_the_gradient(folder: Path, microbatch_tokens: int, sharing: str) -> None:
    whole = gradient(folder, critic_sharing=sharing, algorithm_entropy_coef=0.01)
    split = gradient(
        folder, critic_sharing=sharing, algorithm_entropy_coef=0.01, algorithm_microbatch_tokens=microbatch_tokens
    )
    same(whole, split)


def test_the_order_of_rows_does_not_matter(tiny_policy: Path) -> None:
    mixed = gradient(tiny_policy, lambda batch: select_rows(batch, [3, 7, 0, 5, 1, 6, 2, 4]))
    same(gradient(tiny_policy), mixed)


@pytest.mark.parametrize("microbatch_tokens", [1, 16_384])
def test_a_row_that_counts_no_token_is_as_good_as_absent(tiny_policy: Path, microbatch_tokens: int) -> None:
    def masked(batch: TrainingBatch) -> TrainingBatch:
        mask = batch.response_mask.clone()
        mask[2] = False
        advantages = batch.advantages.clone()
        advantages[2] = 1e6
        return dataclasses.replace(batch, response_mask=mask, advantages=advantages)

    absent = gradient(tiny_policy, lambda batch: select_rows(batch, [0, 1, 3, 4, 5, 6, 7]))
    same(absent, gradient(tiny_policy, masked, algorithm_microbatch_tokens=microbatch_tokens))


def test_every_optimizer_step_divides_by_its_own_tokens(tiny_policy: Path) -> None:
    """Minibatches of one answer each, at a rate that moves nothing: every step has the gradient of an answer alone."""
    setup = in_double(setup_of(tiny_policy, algorithm_minibatch_size=1, optim_learning_rate=1e-30))
    steps = gradients_of(setup.updater, uneven(setup))
    alone = [gradient(tiny_policy, lambda batch, row=row: select_rows(batch, [row])) for row in range(8)]
    assert len(steps) == 8
    for one, other in zip(sorted(steps, key=torch.norm), sorted(alone, key=torch.norm), strict=True):
        same(one, other)


PROMPTS = [(4,), (5, 6, 7), (8, 9, 10, 11, 12)]
REPLIES = [(5, 6, 7, 2), (2,), (9, 0, 2)]


def statistics(setup: TrainingSetup, rows: slice = slice(None), **padding: int) -> tuple[list[Tensor], Tensor]:
    """Log-probs, entropies, values and final value of each answer, and the gradient of their sum."""
    rollouts = rollouts_of(PROMPTS[rows], REPLIES[rows], **padding)
    found = setup.actor_critic.analyze(rollouts, 0.7)
    mask = rollouts.response_mask
    per_token = [found.logprobs, found.entropy, found.values]
    rows_of = [
        torch.cat([x[i][mask[i]] for x in per_token] + [found.final_values[i : i + 1]]) for i in range(len(mask))
    ]
    parameters = setup.actor_critic.policy_parameters() + setup.actor_critic.critic_parameters()
    gradients = torch.autograd.grad(torch.cat(rows_of).sum(), parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return rows_of, torch.cat([g.flatten() for g in flat])


def with_a_critic(folder: Path, sharing: str) -> TrainingSetup:
    setup = in_double(setup_of(folder, critic_sharing=sharing))
    head = setup.actor_critic.value_head if sharing == "shared" else setup.actor_critic.critic.score
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    return setup


@pytest.mark.parametrize("sharing", ["separate", "shared"])
@pytest.mark.parametrize(
    "padding", [{"extra_left": 3}, {"extra_right": 2}, {"pad_id": 2}, {"pad_id": 9, "extra_left": 1, "extra_right": 1}]
)
def test_padding_changes_nothing(folder: Path, sharing: str, padding: dict[str, int]) -> None:
    setup = with_a_critic(folder, sharing)
    (plain, plain_gradient), (padded, padded_gradient) = statistics(setup), statistics(setup, **padding)
    for ours, theirs in zip(plain, padded, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    same(plain_gradient, padded_gradient)


@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_an_answer_alone_is_the_answer_in_a_batch(folder: Path, sharing: str) -> None:
    setup = with_a_critic(folder, sharing)
    together, joint_gradient = statistics(setup)
    alone = [statistics(setup, slice(i, i + 1)) for i in range(3)]
    for i in range(3):
        torch.testing.assert_close(together[i], alone[i][0][0], **CLOSE)
    same(joint_gradient, sum(g for _, g in alone))


def test_micro_batches_of_an_analysis_change_nothing(folder: Path) -> None:
    setup = with_a_critic(folder, "separate")
    rollouts = rollouts_of(PROMPTS, REPLIES)
    one_by_one, at_once = (analyze_all(setup.actor_critic, rollouts, 0.7, tokens) for tokens in (1, 16_384))
    for field in dataclasses.fields(one_by_one):
        torch.testing.assert_close(getattr(one_by_one, field.name), getattr(at_once, field.name), **CLOSE)


def test_rewards_are_read_at_the_last_real_token(folder: Path) -> None:
    """Padding on either side, other texts beside it, and end or pad ids within the text change no score."""
    reward_model = RewardModel.load(str(folder), template="{prompt}{response}")
    torch.nn.init.normal_(reward_model.model.score.weight, generator=torch.Generator().manual_seed(0))
    rows = [[5], [6, 2, 0, 7], [2, 2, 9, 10, 11, 12], [0, 5, 0]]
    together = reward_model.score_rows(rows)
    assert together.unique().numel() == 4
    for row, score in zip(rows, together, strict=True):
        torch.testing.assert_close(reward_model.score_rows([row])[0], score, rtol=1e-5, atol=1e-5)
        tokens = torch.tensor([[*[0] * left, *row, *[0] * (3 - left)] for left in (0, 2, 3)])
        mask = torch.tensor([[*[False] * left, *[True] * len(row), *[False] * (3 - left)] for left in (0, 2, 3)])
        with torch.no_grad():
            torch.testing.assert_close(reward_model.compute_scores(tokens, mask), score.expand(3), rtol=1e-5, atol=1e-5)


def test_the_reference_stays_where_the_policy_started(folder: Path) -> None:
    setup = setup_of(folder)
    start = [p.detach().clone() for p in setup.reference.policy.parameters()]
    assert not any(p.requires_grad for p in setup.reference.policy.parameters())
    in_optimizer = {id(p) for group in setup.updater.optimizer.param_groups for p in group["params"]}
    assert not in_optimizer & {id(p) for p in setup.reference.policy.parameters()}
    for step in (1, 2, 3):
        setup.updater.update(experience(setup, step)[1], step, kl_coef=0.1, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(start, setup.reference.policy.parameters(), strict=True))
    batch = experience(setup, 4)[1]
    assert (batch.logprobs - batch.ref_logprobs).abs().max() > 0.01


def test_dropout_is_off_in_every_pass(tiny_gpt2: Path) -> None:
    setup = setup_of(tiny_gpt2)
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in setup.actor_critic.modules())
    rollouts = rollouts_of(PROMPTS, REPLIES)
    first, second = (setup.actor_critic.analyze(rollouts, 0.7).logprobs for _ in range(2))
    assert torch.equal(first, second)
    setup.updater.update(experience(setup)[1], 1, kl_coef=0.1, seed=0)
    modules = [*setup.actor_critic.modules(), *setup.reference.modules()]
    assert not any(module.training for module in modules if isinstance(module, torch.nn.Dropout))


def test_tied_weights_are_one_parameter_and_stay_tied(tiny_gpt2: Path, tmp_path: Path) -> None:
    setup = setup_of(tiny_gpt2)
    policy = setup.actor_critic.policy
    trained = [p for group in setup.updater.optimizer.param_groups for p in group["params"]]
    assert len(trained) == len({id(p) for p in trained})
    assert sum(p is policy.get_input_embeddings().weight for p in trained) == 1
    setup.updater.update(experience(setup)[1], 1, kl_coef=0.1, seed=0)
    save_model(policy, load_tokenizer(str(tiny_gpt2)), tmp_path)
    again = load_causal_lm(str(tmp_path))
    for model in (policy, again):
        assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    rollouts = rollouts_of(PROMPTS, REPLIES)
    ours, theirs = (ActorCritic(model).analyze(rollouts, 1.0).logprobs for model in (policy, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_without_its_adapter_the_policy_is_the_reference(tiny_policy: Path) -> None:
    pytest.importorskip("peft")
    setup = setup_of(tiny_policy, policy_lora={"r": 4}, optim_learning_rate=1e-2)
    rollouts = rollouts_of(PROMPTS, REPLIES)
    start = setup.actor_critic.analyze(rollouts, 0.7).logprobs
    setup.updater.update(experience(setup)[1], 1, kl_coef=0.1, seed=0)
    assert (setup.actor_critic.analyze(rollouts, 0.7).logprobs - start).abs().max() > 1e-3
    with without_adapter(setup.actor_critic.policy):
        assert torch.equal(setup.actor_critic.analyze(rollouts, 0.7).logprobs, start)


@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_a_critic_warm_up_leaves_the_policy_alone(tiny_policy: Path, sharing: str) -> None:
    setup = setup_of(tiny_policy, critic_sharing=sharing)
    rollouts = rollouts_of(PROMPTS, REPLIES)
    before = setup.actor_critic.analyze(rollouts, 0.7)
    setup.updater.update(experience(setup)[1], 1, kl_coef=0.1, seed=0, step_scale=0.0)
    after = setup.actor_critic.analyze(rollouts, 0.7)
    assert torch.equal(before.logprobs, after.logprobs)
    assert not torch.equal(before.values, after.values)
