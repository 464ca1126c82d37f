"""Parts of a real run on tiny models, and answers that are chosen instead of sampled."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel.config import TrainConfig, parse
from keel.data.batches import Rollouts, ScoredRollouts, TrainingBatch
from keel.data.padding import pad_rows
from keel.data.prompts import Prompt
from keel.learn.shaping import ScoreStatistics
from keel.learn.targets import build_targets
from keel.learn.update import Updater
from keel.rollout.score import score
from keel.shards import full_tensor
from keel.training.setup import TrainingSetup, build_training_setup
from keel.world import World

PROMPTS = ["w5", "w1 w2 w3", "w9 w9 w4 w4 w0", "w7 w8"]
ONE = World(0, 1, torch.device("cpu"))


def judge(completions: list[str], **_: Any) -> list[float]:
    """A score between -1 and 1 that differs from answer to answer."""
    return [sum(map(ord, text)) % 41 / 20 - 1 for text in completions]


def setup_of(
    folder: Path, name: str = "ppo", batch_size: int = 8, world: World = ONE, **settings: Any
) -> TrainingSetup:
    """What `keel train` builds before its loop. Settings are dotted names with _ for the dot: algorithm_kl_coef=0.1"""
    values: dict[str, Any] = {
        "output": "unused",
        "policy": {"model": str(folder)},
        "prompts": {"path": "unused", "max_tokens": 8},
        "rollout": {"batch_size": batch_size, "max_response_tokens": 6, "temperature": 0.7},
        "algorithm": {"name": name, "update_epochs": 1, "minibatch_size": batch_size, "kl_coef": 0.1},
        "optim": {"learning_rate": 1e-3, "schedule": "constant", "max_grad_norm": 1e9},
    }
    for place, value in settings.items():
        section, _, key = place.partition("_")
        values.setdefault(section, {})[key] = value
    return build_training_setup(parse(TrainConfig, values), [judge], PROMPTS, world)


def in_double(setup: TrainingSetup) -> TrainingSetup:
    """The same setup with float64 weights, so that what must be equal is equal to ten digits."""
    for models in (setup.actor_critic, setup.reference):
        if models is not None:
            models.double()
    return setup


def experience(setup: TrainingSetup, step: int = 1) -> tuple[ScoredRollouts, TrainingBatch]:
    """One batch, up to what the update aims at."""
    scored = score(setup.respond(step), setup.scorers, setup.tokenizer)
    return scored, targets_of(setup, scored)


def targets_of(setup: TrainingSetup, scored: ScoredRollouts) -> TrainingBatch:
    """What the update aims at. As in training, the models' values are from then on in its units."""
    token_scores = setup.shaping.token_scores(scored, ScoreStatistics())
    kl_coef = setup.config.algorithm.kl_coef
    targets = build_targets(
        scored, token_scores, setup.actor_critic, setup.reference, setup.algorithm, setup.targets, kl_coef, ONE
    )
    setup.actor_critic.value_units = targets.value_units
    return targets.batch


def uneven(setup: TrainingSetup) -> TrainingBatch:
    """Eight answers of one to six tokens, with advantages of both signs and values to learn."""
    batch = experience(setup)[1]
    lengths = torch.tensor([1, 6, 2, 5, 1, 3, 4, 6])
    mask = torch.arange(batch.response_mask.shape[1]) < lengths.unsqueeze(1)
    generator = torch.Generator().manual_seed(5)
    advantages, returns = torch.randn(2, *mask.shape, generator=generator)
    return replace(batch, response_mask=mask, advantages=advantages, returns=returns)


def counted_only(batch: TrainingBatch, rows: str) -> TrainingBatch:
    """The batch with the tokens of these rows counted, such as "0245", and no others."""
    mask = batch.response_mask.clone()
    mask[[row for row in range(batch.size) if str(row) not in rows]] = False
    return replace(batch, response_mask=mask)


def gradients_of(updater: Updater, batch: TrainingBatch) -> list[Tensor]:
    """The gradients that the optimizer gets in each of its steps, joined. The weights move."""
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [full_tensor(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
        seen.append(torch.cat([gradient.flatten() for gradient in gradients]))

    handle = updater.optimizer.register_step_pre_hook(look)
    updater.update(batch, step=1, kl_coef=0.1, seed=0)
    handle.remove()
    return seen


def rollouts_of(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int = 0,
    extra_left: int = 0,
    extra_right: int = 0,
) -> Rollouts:
    """Given answers to given prompts, with as much more padding as wanted."""
    prompt_tokens, prompt_mask = pad_rows(prompts, pad_id, side="left")
    response_tokens, response_mask = pad_rows(responses, pad_id)
    pad = torch.nn.functional.pad
    return Rollouts(
        prompts=[Prompt("", "", tuple(tokens), {}) for tokens in prompts],
        prompt_tokens=pad(prompt_tokens, (extra_left, 0), value=pad_id),
        prompt_mask=pad(prompt_mask, (extra_left, 0), value=False),
        response_tokens=pad(response_tokens, (0, extra_right), value=pad_id),
        response_mask=pad(response_mask, (0, extra_right), value=False),
        logprobs=torch.zeros(response_tokens.shape[0], response_tokens.shape[1] + extra_right),
        truncated=torch.zeros(len(prompts), dtype=torch.bool),
        texts=[""] * len(prompts),
    )


@torch.no_grad()
def plain_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """What transformers says comes after each of these tokens, alone and unpadded. [L, V]"""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].double()


def uniforms_for(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> list[float]:
    """The uniform numbers with which inverse-transform sampling yields `response`: the middle of each token's share."""
    numbers = []
    for t, token in enumerate(response):
        share = (plain_logits(model, [*prompt, *response[:t]])[-1] / temperature).softmax(-1)
        numbers.append(float(share[:token].sum() + share[token] / 2))
    return numbers
