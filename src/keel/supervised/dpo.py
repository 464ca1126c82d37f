"""What `keel dpo` does: a policy learns from pairs or rankings directly, without a reward model.

Its own log-probabilities are the reward model that the comparisons fit: an answer's implicit reward is
beta * (log pi(y|x) - log pi_ref(y|x)), pi_ref being the weights of the start (Rafailov et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keel.config import DpoConfig
from keel.core.preferences import bradley_terry_loss, implicit_rewards, ipo_loss
from keel.data.notes import Notes, note_comparison
from keel.data.padding import microbatches
from keel.data.preferences import Ranking
from keel.data.rows import naming_place
from keel.data.turns import Example, encode_ranking
from keel.errors import DataError
from keel.learn.comparisons import Comparisons, listwise_losses, pairwise_losses
from keel.models.heads import plain
from keel.models.loading import save_policy
from keel.models.prompt_reading import print_remarks
from keel.models.vocabulary import require_embeddings
from keel.run.folder import RunFolder
from keel.run.reward_files import write_held_out
from keel.stats.preference_metrics import accuracy, accuracy_interval, build_pairs
from keel.supervised.learner import Task
from keel.supervised.loop import fit
from keel.supervised.ranking_task import data_metrics
from keel.supervised.reference_logprobs import kept_reference
from keel.supervised.sft import load_speaker, longest_row, target_losses
from keel.supervised.split import Split, split_rankings


@dataclass
class DpoSplit:
    """The rankings of one side of the split, and their answers as the policy reads them."""

    rankings: list[Ranking]
    responses: list[list[Example]]  # of each ranking
    reference: list[Tensor] = field(default_factory=list)  # log pi_ref of each ranking's answers, once the run began
    num_cut: int = 0  # rankings whose prompt lost its beginning

    @property
    def all_responses(self) -> list[Example]:
        return [response for responses in self.responses for response in responses]

    def split(self, values: Tensor) -> list[Tensor]:
        """A value for each answer [M], ranking by ranking."""
        return list(values.split([len(responses) for responses in self.responses]))

    def to_lists(self, values: Tensor) -> list[list[float]]:
        return [part.tolist() for part in self.split(values)]


def dpo(config: DpoConfig, resume: bool = False) -> dict[str, float]:
    """Learn a policy from pairs or rankings; it is in `output/policy`. Returns the figures on held-out prompts."""
    split = split_rankings(config)
    model, tokenizer, ends = load_speaker(config)
    limit, notes = longest_row(config, model), Notes(bare=config.data.chat is None)
    sides = {
        name: encode_side(rankings, tokenizer, ends, limit, notes)
        for name, rankings in (("train", split.train), ("watched", split.watched), ("held_out", split.held_out))
    }
    for side in sides.values():
        require_embeddings(model, [response.tokens for response in side.all_responses], tokenizer, config.data.path)
    print_remarks(notes.lines())
    return fit(config, dpo_task(config, model, tokenizer, split, sides), resume)


def dpo_task(config: DpoConfig, model: Any, tokenizer: Any, split: Split[Ranking], sides: dict[str, DpoSplit]) -> Task:
    """What `fit` needs to know of the policy and its data."""
    train, watched, held_out = sides["train"], sides["watched"], sides["held_out"]
    speak = partial(response_logprobs, model, microbatch_tokens=config.microbatch_tokens)

    def prepare(folder: RunFolder) -> None:
        ask = torch.no_grad()(lambda: {name: speak(side.all_responses) for name, side in sides.items()})
        for name, logprobs in kept_reference(folder, ask).items():
            sides[name].reference = sides[name].split(logprobs.to(plain(model).device))

    def loss(rows: Sequence[int]) -> Tensor:
        logprobs = speak([response for i in rows for response in train.responses[i]])
        rewards = implicit_rewards(logprobs, torch.cat([train.reference[i] for i in rows]), config.beta)
        return dpo_losses(rewards, [train.rankings[i] for i in rows], config).sum()

    return Task(
        name="dpo",
        model=model,
        lengths=[sum(len(response.tokens) for response in responses) for responses in train.responses],
        weights=[1] * len(train.rankings),
        row=lambda i: {name: getattr(train.rankings[i], name) for name in ("prompt", "responses", "ranks")},
        loss=loss,
        evaluate=lambda: evaluate_policy(model, held_out, config),
        facts={name: value for name, value in data_metrics(split).items() if not name.startswith("constant")}
        | {"rows_cut": sum(side.num_cut for side in sides.values())},
        save=lambda folder, metrics: save_policy(model, tokenizer, folder),
        result="policy",
        watch=(lambda: evaluate_policy(model, watched, config)["loss"]) if watched.rankings else None,
        conclude=lambda folder: conclude(folder, model, held_out, config),
        prepare=prepare,
    )


def encode_side(rankings: list[Ranking], tokenizer: Any, ends: Sequence[int], limit: int, notes: Notes) -> DpoSplit:
    """Each answer after its prompt, and an end token after that. Raises DataError for answers that do not fit.

    A prompt that is too long loses its beginning, a chat its oldest turns, and all answers of a ranking are given after
    the same rest of it. An answer is never cut: what people said of the whole is not true of its beginning.
    """
    responses, too_long, num_cut = [], [], 0
    for ranking in rankings:
        with naming_place(ranking.place):
            found, was_cut = encode_ranking(ranking, tokenizer, ends, limit)
            note_comparison(ranking.prompt, ranking.responses, ranking.tools, ranking.place, tokenizer, notes)
        if found:
            responses.append(found)
        else:
            too_long.append(ranking.place)
        num_cut += was_cut
        if was_cut:
            notes.add_for_place(ranking.place, f"more than {limit} tokens (max_tokens); the prompt lost its beginning")
    if too_long:
        raise DataError(
            f"{len(too_long)} rankings have answers that leave no room for a prompt (of a chat, its last turn) within "
            f"{limit} tokens",
            where=too_long[0],
            fix="raise max_tokens, or leave them out",
        )
    return DpoSplit(rankings, responses, num_cut=num_cut)


def response_logprobs(model: Any, responses: Sequence[Example], microbatch_tokens: int) -> Tensor:
    """log pi(y|x): the sum over the answer's tokens, the end token included, with gradient. -> [M]"""
    if not responses:
        return torch.zeros(0)
    groups = microbatches([len(response.tokens) for response in responses], microbatch_tokens)
    sums = []
    for group in groups:
        logprobs = -target_losses(model, [responses[i] for i in group])
        sums += [part.sum() for part in logprobs.split([responses[i].num_targets for i in group])]
    order = torch.tensor([i for group in groups for i in group], device=sums[0].device)
    return torch.stack(sums)[order.argsort()]


def dpo_losses(rewards: Tensor, rankings: Sequence[Ranking], config: DpoConfig) -> Tensor:
    """Loss of each ranking, per comparison in it, times its weight. Implicit rewards of all answers [M] -> [N]

    Each ranking counts once, however many answers it has, as in `keel reward`.
    """
    comparisons = Comparisons.from_rankings(rewards, rankings)
    if config.loss == "listwise":  # Rafailov et al. 2023, appendix A.3
        losses = listwise_losses(comparisons)
    else:
        losses = pairwise_losses(comparisons, partial(pair_loss, config), config.ties)
    return rewards.new_tensor([ranking.weight for ranking in rankings]) * losses


def pair_loss(config: DpoConfig, chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """From implicit rewards. [M], [M], [M] -> [M]"""
    if config.loss == "ipo":
        return ipo_loss(chosen, rejected, config.beta)
    return bradley_terry_loss(chosen, rejected, margins, config.label_smoothing)


def evaluate_policy(model: Any, side: DpoSplit, config: DpoConfig) -> dict[str, float]:
    """Figures of the implicit rewards on rankings that the policy has not learned from; nothing without any.

    They are means over the pairs of answers that were told apart, each ranking counting by its weight; forward_kl is
    the mean of log pi_ref - log pi over all answers.
    """
    if not side.rankings:
        return {}
    logprobs, rewards = logprobs_and_rewards(model, side, config)
    spoken, worth = side.to_lists(logprobs), side.to_lists(rewards)
    pairs = build_pairs(worth, side.rankings)

    def mean(values: list[list[float]], place: int) -> float:
        """Over the chosen answers (place 0) or the rejected ones (1)."""
        found = [values[number][places[place]] for number, places in zip(pairs.rankings, pairs.places, strict=True)]
        return float(pairs.weights @ found)

    losses = dpo_losses(rewards, side.rankings, config)
    return {
        "loss": float(losses.sum()) / sum(ranking.weight for ranking in side.rankings),
        "accuracy": accuracy(pairs),
        "margin": float(pairs.weights @ pairs.differences),
        "chosen_reward": mean(worth, 0),
        "rejected_reward": mean(worth, 1),
        "chosen_logprob": mean(spoken, 0),
        "forward_kl": float((torch.cat(side.reference) - logprobs).mean()),
    }


@torch.no_grad()
def logprobs_and_rewards(model: Any, side: DpoSplit, config: DpoConfig) -> tuple[Tensor, Tensor]:
    """log pi(y|x) and implicit reward of every answer. -> [M], [M]"""
    logprobs = response_logprobs(model, side.all_responses, config.microbatch_tokens)
    return logprobs, implicit_rewards(logprobs, torch.cat(side.reference), config.beta)


def conclude(folder: RunFolder, model: Any, held_out: DpoSplit, config: DpoConfig) -> dict[str, float]:
    """The interval of the accuracy; the implicit rewards are written down beside the rankings they speak of."""
    if not held_out.rankings:
        return {}
    scores = held_out.to_lists(logprobs_and_rewards(model, held_out, config)[1])
    write_held_out(folder, held_out.rankings, scores)
    low, high = accuracy_interval(build_pairs(scores, held_out.rankings), held_out.rankings)
    return {"accuracy_low": low, "accuracy_high": high}
