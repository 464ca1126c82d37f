"""Reward modelling: the loop of `keel reward`. The model learns to score answers in the order people put them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.config import RewardConfig
from keel.core.preferences import bradley_terry_loss, tied_plackett_luce_loss
from keel.data.preferences import Ranking, load_rankings, prompt_key, split_by_prompt
from keel.errors import ConfigError
from keel.models.heads import trunk
from keel.models.layers import recompute_layers
from keel.models.reward_model import RewardModel
from keel.train.judging import baselines, judge
from keel.train.supervised import Task, fit


@dataclass(frozen=True)
class EncodedRanking:
    """The ranked answers to one prompt as the reward model reads them."""

    rows: list[list[int]]
    ranks: list[int]
    margin: float


def reward(config: RewardConfig, resume: bool = False) -> dict[str, float]:
    """Learn a reward model from pairs or rankings; it is in `output/model`. Returns the figures on held-out prompts."""
    train, held_out, left_out = load_split(config)
    shared = set.intersection(*({prompt_key(ranking.prompt) for ranking in side} for side in (train, held_out)))
    torch.manual_seed(config.seed)  # the adapter's start
    model = RewardModel.load(config.model, config.dtype, config.template, config.lora, max_tokens=config.max_tokens)
    if config.gradient_checkpointing:
        recompute_layers(trunk(model.model))
    encoded = [encode(model, ranking) for ranking in train]
    held_out_rows = [encode(model, ranking).rows for ranking in held_out]

    def evaluate() -> dict[str, float]:
        if not held_out:
            return {}
        scores = model.score_rows([row for rows in held_out_rows for row in rows], config.microbatch_tokens)
        return judge(scores.split([len(rows) for rows in held_out_rows]), held_out)

    task = Task(
        name="reward",
        model=model.model,
        lengths=[sum(map(len, ranking.rows)) for ranking in encoded],
        weights=[1] * len(encoded),
        row=lambda i: {"prompt": train[i].prompt, "responses": train[i].responses, "ranks": train[i].ranks},
        loss=lambda rows: ranking_losses(model, [encoded[i] for i in rows], config).sum(),
        evaluate=evaluate,
        facts=baselines(held_out, train) | {"rankings_left_out": left_out, "prompts_on_both_sides": len(shared)},
        save=model.save,
    )
    return fit(config, task, resume)


def load_split(config: RewardConfig) -> tuple[list[Ranking], list[Ranking], int]:
    """Rankings to learn from, rankings of held-out prompts, and how many were left out because they prefer nothing."""
    data = config.data
    rankings = load_rankings(data.path, data.split)
    train = [ranking.ranked for ranking in rankings if ranking.pairs]
    left_out = len(rankings) - len(train)
    if config.loss == "listwise" and any(ranking.margin for ranking in rankings):
        raise ConfigError("a margin belongs to a pair", where=data.path, fix="set loss: pairwise")
    if data.eval_path:
        others = load_rankings(data.eval_path, data.split)
        return train, [ranking.ranked for ranking in others if ranking.pairs], left_out
    return *split_by_prompt(train, lambda ranking: ranking.prompt, data.eval_fraction, config.seed), left_out


def encode(model: RewardModel, ranking: Ranking) -> EncodedRanking:
    rows = [model.encode(ranking.prompt, response) for response in ranking.responses]
    return EncodedRanking(rows, [rank for rank in ranking.ranks if rank is not None], ranking.margin)


def ranking_losses(model: RewardModel, rankings: Sequence[EncodedRanking], config: RewardConfig) -> Tensor:
    """Loss of each ranking, per comparison in it, and center_coef * (2 * mean score)^2. -> [N]

    All answers of a ranking are scored once. Each ranking counts once, however many answers it has: its comparisons
    share the same few answers, and a mean over all pairs would be ruled by the longest rankings (Ouyang et al. 2022,
    section 3.5). For a pair the second term is center_coef * (r_chosen + r_rejected)^2 (Eisenstein et al. 2023).
    """
    # Answers to one prompt differ in length and belong together in the loss, not in the forward pass.
    flat = model.scores_of_rows([row for ranking in rankings for row in ranking.rows], config.microbatch_tokens)
    counts = torch.tensor([len(ranking.rows) for ranking in rankings], device=flat.device)
    mask = torch.arange(int(counts.max()), device=flat.device) < counts.unsqueeze(1)
    scores = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
    flat_ranks = torch.tensor([rank for ranking in rankings for rank in ranking.ranks], device=flat.device)
    ranks = flat_ranks.new_zeros(mask.shape).masked_scatter(mask, flat_ranks)
    center = config.center_coef * (2 * scores.sum(1) / counts) ** 2
    if config.loss == "listwise":
        return listwise_losses(scores, ranks, mask) + center
    margins = flat.new_tensor([ranking.margin for ranking in rankings])
    return pairwise_losses(scores, ranks, mask, margins) + center


def pairwise_losses(scores: Tensor, ranks: Tensor, mask: Tensor, margins: Tensor) -> Tensor:
    """Mean Bradley-Terry loss over the pairs of each ranking that were told apart. [N, K] (three), [N] -> [N]"""
    better = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)  # [N, i, j]: i before j
    n, i, j = better.nonzero(as_tuple=True)
    losses = bradley_terry_loss(scores[n, i], scores[n, j], margins[n])
    return torch.zeros_like(margins).index_add(0, n, losses) / better.sum((1, 2))


def listwise_losses(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Plackett-Luce loss of each ranking, per answer that was put before others. [N, K] (three) -> [N]"""
    last = mask & (ranks == ranks.max(1, keepdim=True).values)
    return tied_plackett_luce_loss(scores, ranks, mask) / (mask & ~last).sum(1)
