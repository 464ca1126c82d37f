"""Train a policy directly from pairs or rankings, without a reward model (`keel dpo`).

The comparisons fit the implicit reward of a response, beta * (log pi(y|x) - log pi_ref(y|x)), where pi_ref has the
weights of the start (Rafailov et al. 2023). SimPO and ORPO compare log-probabilities without a reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keel.config import DpoConfig
from keel.data.notes import Notes, note_comparison
from keel.data.preferences import Ranking
from keel.data.rows import place_in_errors
from keel.data.turns import Example, encode_ranking
from keel.errors import DataError
from keel.models.heads import unwrap_model
from keel.models.loading import save_policy
from keel.models.prompt_reading import print_remarks
from keel.models.vocabulary import require_embeddings
from keel.run.folder import RunFolder
from keel.run.reward_files import write_held_out
from keel.stats.preference_metrics import accuracy, accuracy_interval, build_pairs
from keel.supervised.dpo_losses import response_rewards, total_losses
from keel.supervised.kto import kto
from keel.supervised.learner import SupervisedTask
from keel.supervised.loop import fit
from keel.supervised.ranking_task import data_metrics
from keel.supervised.reference_logprobs import load_or_compute_reference
from keel.supervised.response_logprobs import count_response_tokens, measure_logprobs, response_logprobs
from keel.supervised.sft import load_speaker, longest_row
from keel.supervised.split import Split, split_rankings
from keel.world import World


@dataclass
class DpoSplit:
    """The rankings of one side of the split, with their responses as token ids."""

    rankings: list[Ranking]
    responses: list[list[Example]]  # of each ranking
    reference: list[Tensor] = field(
        default_factory=list
    )  # log pi_ref of each ranking's responses; set by `prepare`, if used
    num_cut: int = 0  # rankings whose prompt lost its beginning

    @property
    def all_responses(self) -> list[Example]:
        return [response for responses in self.responses for response in responses]

    @property
    def ref_logprobs(self) -> Tensor | None:
        """log pi_ref of all responses [M]; None without a reference."""
        return torch.cat(self.reference) if self.reference else None

    def split(self, values: Tensor) -> list[Tensor]:
        """Split the values of all responses [M] by ranking."""
        return list(values.split([len(responses) for responses in self.responses]))

    def to_lists(self, values: Tensor) -> list[list[float]]:
        return [of_ranking.tolist() for of_ranking in self.split(values)]


def dpo(config: DpoConfig, resume: bool = False) -> dict[str, float]:
    """Train a policy from pairs or rankings, or with loss kto from labelled responses, and save it in `output/policy`.

    Return the metrics on held-out prompts.
    """
    if config.loss == "kto":
        return kto(config, resume)
    world = World.from_environment(config.parallel.shard)
    split = split_rankings(config)
    model, tokenizer, ends = load_speaker(config, world)
    limit, notes = longest_row(config, model), Notes(bare=config.data.chat is None)
    sides = {
        name: encode_side(rankings, tokenizer, ends, limit, notes)
        for name, rankings in (("train", split.train), ("watched", split.watched), ("held_out", split.held_out))
    }
    for side in sides.values():
        require_embeddings(model, [response.tokens for response in side.all_responses], tokenizer, config.data.path)
    print_remarks(notes.lines())
    return fit(config, dpo_task(config, model, tokenizer, split, sides, world), world, resume)


def dpo_task(
    config: DpoConfig, model: Any, tokenizer: Any, split: Split[Ranking], sides: dict[str, DpoSplit], world: World
) -> SupervisedTask:
    """Describe the policy and its data for `fit`."""
    train, watched, held_out = sides["train"], sides["watched"], sides["held_out"]

    def compute_reference() -> dict[str, Tensor]:
        return {
            name: measure_logprobs(model, side.all_responses, config.microbatch_tokens, world)
            for name, side in sides.items()
        }

    def prepare(folder: RunFolder) -> None:
        if not config.has_reference:
            return
        for name, logprobs in load_or_compute_reference(folder, compute_reference, world).items():
            sides[name].reference = sides[name].split(logprobs.to(unwrap_model(model).device))

    def loss(rows: Sequence[int]) -> Tensor:
        responses = [response for i in rows for response in train.responses[i]]
        logprobs, lengths = (
            response_logprobs(model, responses, config.microbatch_tokens),
            count_response_tokens(responses),
        )
        reference = torch.cat([train.reference[i] for i in rows]) if config.has_reference else None
        lengths = lengths.to(logprobs)
        rewards = response_rewards(logprobs, lengths, reference, config)
        return total_losses(logprobs, lengths, rewards, [train.rankings[i] for i in rows], config).sum()

    return SupervisedTask(
        name="dpo",
        model=model,
        lengths=[sum(len(response.tokens) for response in responses) for responses in train.responses],
        weights=[1] * len(train.rankings),
        row=lambda i: {name: getattr(train.rankings[i], name) for name in ("prompt", "responses", "ranks")},
        loss=loss,
        evaluate=lambda: evaluate_policy(model, held_out, config, world),
        facts={name: value for name, value in data_metrics(split).items() if not name.startswith("constant")}
        | {"rows_cut": sum(side.num_cut for side in sides.values())},
        save=lambda plain, folder, metrics: save_policy(plain, tokenizer, folder),
        result="policy",
        watch=(lambda: evaluate_policy(model, watched, config, world)["loss"]) if watched.rankings else None,
        conclude=lambda folder: conclude_dpo(folder, model, held_out, config, world),
        prepare=prepare,
    )


def encode_side(rankings: list[Ranking], tokenizer: Any, ends: Sequence[int], limit: int, notes: Notes) -> DpoSplit:
    """Encode each response after its prompt, with an end token. Raises DataError for responses that do not fit.

    A prompt that is too long loses its beginning (a chat its oldest turns), by the same amount for all responses of a
    ranking. A response is never cut: the rank of the full text need not hold for its beginning.
    """
    responses, too_long, num_cut = [], [], 0
    for ranking in rankings:
        with place_in_errors(ranking.place):
            examples, was_cut = encode_ranking(ranking, tokenizer, ends, limit)
            note_comparison(ranking.prompt, ranking.responses, ranking.tools, ranking.place, tokenizer, notes)
        if examples:
            responses.append(examples)
        else:
            too_long.append(ranking.place)
        num_cut += was_cut
        if was_cut:
            notes.add_for_place(ranking.place, f"more than {limit} tokens (max_tokens); the prompt lost its beginning")
    if too_long:
        raise DataError(
            f"{len(too_long)} rankings have responses that leave no room for the prompt (of a chat: its last turn) "
            f"within {limit} tokens",
            where=too_long[0],
            fix="raise max_tokens, or remove these rankings",
        )
    return DpoSplit(rankings, responses, num_cut=num_cut)


def evaluate_policy(model: Any, side: DpoSplit, config: DpoConfig, world: World) -> dict[str, float]:
    """Compute metrics of the implicit rewards on rankings that are not trained on. Empty without any.

    The metrics are means over the pairs with a preference, each ranking counting by its weight. `forward_kl` is the
    mean of log pi_ref - log pi over all responses; it needs a reference.
    """
    if not side.rankings:
        return {}
    logprobs, rewards = logprobs_and_rewards(model, side, config, world)
    logprob_lists, reward_lists = side.to_lists(logprobs), side.to_lists(rewards)
    pairs = build_pairs(reward_lists, side.rankings)

    def mean(values: list[list[float]], place: int) -> float:
        """Average over the chosen (place 0) or the rejected (place 1) responses of the pairs."""
        by_pair = [values[number][places[place]] for number, places in zip(pairs.rankings, pairs.places, strict=True)]
        return float(pairs.weights @ by_pair)

    lengths = count_response_tokens(side.all_responses).to(logprobs)
    losses = total_losses(logprobs, lengths, rewards, side.rankings, config)
    reference = side.ref_logprobs
    return {
        "loss": float(losses.sum()) / sum(ranking.weight for ranking in side.rankings),
        "accuracy": accuracy(pairs),
        "margin": float(pairs.weights @ pairs.differences),
        "chosen_reward": mean(reward_lists, 0),
        "rejected_reward": mean(reward_lists, 1),
        "chosen_logprob": mean(logprob_lists, 0),
        **({} if reference is None else {"forward_kl": float((reference - logprobs).mean())}),
    }


def logprobs_and_rewards(model: Any, side: DpoSplit, config: DpoConfig, world: World) -> tuple[Tensor, Tensor]:
    """Compute log pi(y|x) and the value in comparisons of every response. -> [M], [M]"""
    logprobs = measure_logprobs(model, side.all_responses, config.microbatch_tokens, world)
    lengths = count_response_tokens(side.all_responses).to(logprobs)
    return logprobs, response_rewards(logprobs, lengths, side.ref_logprobs, config)


def conclude_dpo(
    folder: RunFolder, model: Any, held_out: DpoSplit, config: DpoConfig, world: World
) -> dict[str, float]:
    """Write the implicit rewards of the held-out rankings, and return the interval of the accuracy."""
    if not held_out.rankings:
        return {}
    scores = held_out.to_lists(logprobs_and_rewards(model, held_out, config, world)[1])
    world.from_main(lambda: write_held_out(folder, held_out.rankings, scores))
    low, high = accuracy_interval(build_pairs(scores, held_out.rankings), held_out.rankings)
    return {"accuracy_low": low, "accuracy_high": high}
