"""The task of `keel reward`: the loss of a reward model on rankings, and its metrics on held-out prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from keel.config import RewardConfig
from keel.core.preferences import bradley_terry_loss
from keel.data.notes import Notes, note_comparison
from keel.data.preferences import Ranking
from keel.data.rows import place_in_errors
from keel.learn.comparisons import Comparisons, listwise_losses, pairwise_losses
from keel.models.ensemble import member_folders
from keel.models.prompt_reading import print_remarks
from keel.models.reading import Reading
from keel.models.reward_model import RewardModel
from keel.run.folder import RunFolder
from keel.run.reward_files import shortfalls, write_gate, write_held_out, write_range
from keel.stats.preference_metrics import baselines, calibrate, compute_preference_metrics, final_metrics, score_range
from keel.supervised.held_out import measure_rows
from keel.supervised.learner import SupervisedTask
from keel.supervised.split import Split, prompts_on_both_sides
from keel.world import World


@dataclass(frozen=True)
class EncodedRanking:
    """A ranking, with its responses as token ids."""

    rows: list[list[int]]  # prompt and response, in the reward model's template
    ranking: Ranking


def reward_task(config: RewardConfig, model: RewardModel, split: Split[Ranking], world: World) -> SupervisedTask:
    """Describe a reward model and its data for `fit`."""
    notes = Notes(bare=False)  # no remark on plain texts: `template` defines how they are read
    train, cut = encode_rankings(model, split.train, min(config.max_tokens, model.limit), notes)
    watched, held_out = (
        encode_rankings(model, side, model.limit, notes)[0] for side in (split.watched, split.held_out)
    )
    print_remarks(notes.lines())
    facts = data_metrics(split) | {"texts_cut": cut}

    def score(side: Sequence[EncodedRanking]) -> list[list[float]]:
        return score_rankings(model, side, config.microbatch_tokens, world)

    def conclude(folder: RunFolder) -> dict[str, float]:
        scores = score(held_out)
        metrics = final_metrics(scores, split.held_out, facts)
        if config.calibrate:
            scores, metrics = calibrate(scores, metrics)
            model.rescale(1 / metrics["temperature"])
        world.from_main(lambda: write_held_out(folder, split.held_out, scores))
        return metrics | score_range(scores, split.held_out)

    return SupervisedTask(
        name="reward",
        model=model.model,
        lengths=[sum(map(len, encoded.rows)) for encoded in train],
        weights=[1] * len(train),
        row=lambda i: {name: getattr(split.train[i], name) for name in ("prompt", "responses", "ranks")},
        loss=lambda rows: ranking_losses(model, [train[i] for i in rows], config).sum(),
        evaluate=lambda: compute_preference_metrics(score(held_out), split.held_out),
        facts=facts,
        save=lambda plain, folder, metrics: save_with_gate(model.with_weights(plain).save, folder, config, metrics),
        watch=(lambda: compute_preference_metrics(score(watched), split.watched)["loss"]) if split.watched else None,
        conclude=conclude,
    )


def data_metrics(split: Split[Ranking]) -> dict[str, float]:
    """Return metrics that depend on the data alone: the baselines and the counts of rows."""
    counts = {"rankings_left_out": split.left_out, "prompts_on_both_sides": prompts_on_both_sides(split)}
    return baselines(split.held_out, split.train) | counts


def save_with_gate(
    save: Callable[[Path], None], folder: Path, config: RewardConfig, metrics: Mapping[str, float]
) -> None:
    """Save the model with the range of its scores and the verdict of the gate. A failed gate does not prevent it."""
    save(folder)
    write_range(folder, metrics)
    if config.gate:
        failed = shortfalls(config.gate, metrics)
        for model in {folder, *map(Path, member_folders(str(folder)))}:  # a member may be used without the others
            write_gate(model, config.gate, failed)


def encode_rankings(
    model: RewardModel, rankings: Sequence[Ranking], limit: int, notes: Notes
) -> tuple[list[EncodedRanking], float]:
    """Encode the texts of all rankings with at most `limit` tokens, and return the share of texts that were cut.

    A text that is too long loses its beginning. Of a chat, all responses of a ranking keep the same turns.
    """
    encoded, cut = [], []
    for ranking in rankings:
        with place_in_errors(ranking.place):
            readings = [Reading(ranking.prompt, response, tools=ranking.tools) for response in ranking.responses]
            texts = [model.encode_within(reading, limit) for reading in readings]
            was_cut = [each for _, each in texts]
            while any(each for _, each in texts) and (shorter := readings[0].without_oldest_turn()) is not None:
                readings = [replace(reading, prompt=shorter) for reading in readings]
                texts = [model.encode_within(reading, limit) for reading in readings]
            note_comparison(ranking.prompt, ranking.responses, ranking.tools, ranking.place, model.tokenizer, notes)
        encoded.append(EncodedRanking([ids for ids, _ in texts], ranking))
        cut += was_cut
        if any(was_cut):
            notes.add_for_place(ranking.place, f"more than {limit} tokens (max_tokens); the texts lost their beginning")
    return encoded, sum(cut) / max(1, len(cut))


def score_rankings(
    model: RewardModel, encoded: Sequence[EncodedRanking], microbatch_tokens: int, world: World
) -> list[list[float]]:
    """Score each response of each ranking. Each process scores a share of the rankings."""

    def measure(rankings: list[int]) -> list[list[float]]:
        chosen = [encoded[number].rows for number in rankings]
        flat = model.score_rows([row for rows in chosen for row in rows], microbatch_tokens)
        return [scores.tolist() for scores in flat.split([len(rows) for rows in chosen])]

    return measure_rows(model.model, [sum(map(len, each.rows)) for each in encoded], measure, world)


def ranking_losses(model: RewardModel, encoded: Sequence[EncodedRanking], config: RewardConfig) -> Tensor:
    """Compute the loss of each ranking, times its weight. -> [N]

    The loss is the mean over the comparisons of the ranking, plus center_coef * (2 * mean score)^2. For a pair the
    second term is center_coef * (r_chosen + r_rejected)^2 (Eisenstein et al. 2023).

    A ranking with many responses counts no more than one with few. Its comparisons share the same responses, and in a
    mean over all pairs the longest rankings would dominate (Ouyang et al. 2022, section 3.5).
    """
    # Responses to one prompt differ in length. They belong together in the loss but not in the forward pass.
    flat = model.scores_of_rows([row for one in encoded for row in one.rows], config.microbatch_tokens)
    comparisons = Comparisons.from_rankings(flat, [one.ranking for one in encoded])
    if config.loss == "listwise":
        losses = listwise_losses(comparisons)
    else:
        losses = pairwise_losses(comparisons, bradley_terry_loss, config.ties)
    weights = flat.new_tensor([one.ranking.weight for one in encoded])
    return weights * (losses + config.center_coef * (2 * comparisons.means) ** 2)
