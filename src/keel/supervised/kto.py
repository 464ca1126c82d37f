"""Train a policy from responses that are labelled as desirable or undesirable (`keel dpo --loss kto`).

KTO (Ethayarajh et al. 2024, arXiv 2402.01306) raises the implicit reward of desirable responses above a reference
point, and lowers that of undesirable ones below it. The reference point is the KL of the policy to its start. It is
estimated on mismatched pairs, each prompt with the response to another prompt, over all rows of an optimizer step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from keel.config import DpoConfig
from keel.core.preferences import implicit_rewards, kto_loss
from keel.data.labels import LabelledResponse, load_labels
from keel.data.notes import Notes, note_comparison
from keel.data.preferences import Ranking, prompt_key
from keel.data.rows import place_in_errors
from keel.data.turns import Example, encode_ranking
from keel.errors import DataError
from keel.models.heads import unwrap_model
from keel.models.loading import save_policy
from keel.models.prompt_reading import print_remarks, read_prompt_format
from keel.models.vocabulary import require_embeddings
from keel.run.folder import RunFolder
from keel.supervised.learner import SupervisedTask
from keel.supervised.loop import fit
from keel.supervised.reference_logprobs import load_or_compute_reference
from keel.supervised.response_logprobs import measure_logprobs, response_logprobs
from keel.supervised.sft import load_speaker, longest_row
from keel.supervised.split import Split, prompts_on_both_sides, split_rows
from keel.world import World


@dataclass
class KtoSide:
    """The labelled responses of one side of the split, as token ids."""

    labels: list[LabelledResponse]
    examples: list[Example]
    mismatched: list[Example]  # for each label, its prompt with the response to another one
    num_cut: int = 0  # prompts that lost their beginning
    ref_logprobs: Tensor = field(default_factory=lambda: torch.zeros(0))  # [N]; set by `prepare`
    mismatched_ref_logprobs: Tensor = field(default_factory=lambda: torch.zeros(0))  # [N]; set by `prepare`

    @property
    def desirable(self) -> Tensor:
        """[N] bool"""
        return torch.tensor([label.is_desirable for label in self.labels], device=self.ref_logprobs.device)


def kto(config: DpoConfig, resume: bool = False) -> dict[str, float]:
    """Train a policy from labelled responses, and save it in `output/policy`. Return the held-out metrics."""
    world = World.from_environment(config.parallel.shard)
    split = split_labels(config)
    model, tokenizer, ends = load_speaker(config, world)
    limit, notes = longest_row(config, model), Notes(bare=config.data.chat is None)
    sides = {
        name: encode_labels(labels, tokenizer, ends, limit, notes)
        for name, labels in (("train", split.train), ("watched", split.watched), ("held_out", split.held_out))
    }
    for side in sides.values():
        require_embeddings(model, [example.tokens for example in side.examples], tokenizer, config.data.path)
    print_remarks([*notes.lines(), *balance_remarks(split.train, config)])
    return fit(config, kto_task(config, model, tokenizer, split, sides, world), world, resume)


def split_labels(config: DpoConfig) -> Split[LabelledResponse]:
    """Load and split the labelled responses. The weights are scaled to a mean of 1 over the training rows.

    Raises DataError if one side has no desirable or no undesirable response to learn from.
    """
    data, notes = config.data, Notes()
    prompt_format = read_prompt_format(data)

    def load(path: str) -> tuple[list[LabelledResponse], int]:
        labels, num_left_out = load_labels(path, data.split, notes)
        converted = [replace(label, prompt=prompt_format.convert_content(label.prompt)) for label in labels]
        return [label for label in converted if label.weight], num_left_out

    labels, num_left_out = load(data.path)
    others = load(data.eval_path)[0] if data.eval_path else None
    print_remarks(notes.lines())
    split = split_rows(labels, others, lambda label: label.prompt, config)
    for kind, is_desirable in (("desirable", True), ("undesirable", False)):
        if not any(label.is_desirable is is_desirable for label in split.train):
            raise DataError(f"no training row is {kind}", data.path, "kto needs both; use keel sft for good ones alone")
    if (data.eval_path or data.eval_fraction) and not split.held_out:
        raise DataError("no held-out row has a label", where=data.eval_path or data.path)
    mean = sum(label.weight for label in split.train) / len(split.train)
    train = [replace(label, weight=label.weight / mean) for label in split.train]
    return Split(train, split.watched, split.held_out, num_left_out)


def balance_remarks(labels: Sequence[LabelledResponse], config: DpoConfig) -> list[str]:
    """Return a remark where the weighted numbers of desirable and undesirable responses are far from each other.

    The paper recommends a ratio from 1 to 4/3.
    """
    totals = [sum(label.weight for label in labels if label.is_desirable is kind) for kind in (True, False)]
    ratio = config.desirable_weight * totals[0] / (config.undesirable_weight * totals[1])
    if 0.5 <= ratio <= 2.0:
        return []
    return [
        f"{config.data.path}: desirable responses have {ratio:.2g} times the weight of undesirable ones, and KTO's "
        "authors recommend 1 to 1.33; set desirable_weight or undesirable_weight"
    ]


def encode_labels(
    labels: list[LabelledResponse], tokenizer: Any, ends: Sequence[int], limit: int, notes: Notes
) -> KtoSide:
    """Encode each response after its prompt, with an end token. Raises DataError for responses that do not fit.

    A prompt that is too long loses its beginning. A response is never cut: the label of the full text need not hold for
    its beginning.
    """
    examples, num_cut = [], 0
    for label in labels:
        with place_in_errors(label.place):
            ranking = Ranking(label.prompt, (label.response,), (1,), tools=label.tools, place=label.place)
            encoded, was_cut = encode_ranking(ranking, tokenizer, ends, limit)
            note_comparison(label.prompt, (label.response,), label.tools, label.place, tokenizer, notes)
        if encoded is None:
            what = f"the response leaves no room for the prompt (of a chat: its last turn) within {limit} tokens"
            raise DataError(what, where=label.place, fix="raise max_tokens, or remove the row")
        examples += encoded
        num_cut += was_cut
        if was_cut:
            notes.add_for_place(label.place, f"more than {limit} tokens (max_tokens); the prompt lost its beginning")
    return KtoSide(labels, examples, mismatch(labels, examples, limit), num_cut)


def mismatch(labels: Sequence[LabelledResponse], examples: Sequence[Example], limit: int) -> list[Example]:
    """Put after each prompt the response of the next row with another prompt; the last rows continue at the first.

    The response loses its end where both together have more than `limit` tokens. Where all prompts are the same, a row
    keeps its response.
    """
    keys, count = [prompt_key(label.prompt) for label in labels], len(labels)
    following, pairs = list(range(count)), []
    for row in reversed(range(2 * count)):  # twice around, so that the last rows see the first ones
        place, after = row % count, (row + 1) % count
        following[place] = after if keys[after] != keys[place] else following[after]
    for row, example in enumerate(examples):
        other = examples[following[row] if keys[following[row]] != keys[row] else row]
        tokens = example.tokens[: example.num_prompt_tokens] + other.tokens[other.num_prompt_tokens :]
        pairs.append(Example(example.prompt, tokens[:limit], example.num_prompt_tokens))
    return pairs


def kto_task(
    config: DpoConfig,
    model: Any,
    tokenizer: Any,
    split: Split[LabelledResponse],
    sides: dict[str, KtoSide],
    world: World,
) -> SupervisedTask:
    """Describe the policy and its data for `fit`."""
    train, watched, held_out = sides["train"], sides["watched"], sides["held_out"]
    measured = {"kl": 0.0}  # of the current step

    def start_step(rows: Sequence[int]) -> dict[str, float]:
        measured["kl"] = estimate_kl(model, train, rows, config, world)
        return dict(measured)

    def loss(rows: Sequence[int]) -> Tensor:
        logprobs = response_logprobs(model, [train.examples[i] for i in rows], config.microbatch_tokens)
        return label_losses(logprobs, train, rows, measured["kl"], config).sum()

    return SupervisedTask(
        name="dpo",
        model=model,
        lengths=[len(example.tokens) for example in train.examples],
        weights=[1] * len(train.labels),
        row=lambda i: {name: getattr(train.labels[i], name) for name in ("prompt", "response", "is_desirable")},
        loss=loss,
        evaluate=lambda: evaluate_labels(model, held_out, config, world),
        facts=label_facts(split) | {"rows_cut": sum(side.num_cut for side in sides.values())},
        save=lambda plain, folder, metrics: save_policy(plain, tokenizer, folder),
        result="policy",
        watch=(lambda: evaluate_labels(model, watched, config, world)["loss"]) if watched.labels else None,
        prepare=lambda folder: set_reference(model, sides, folder, config, world),
        start_step=start_step,
    )


def label_facts(split: Split[LabelledResponse]) -> dict[str, float]:
    """Return the metrics of the data, which training does not change."""
    return {
        "desirable_share": sum(label.is_desirable for label in split.train) / len(split.train),
        "responses_left_out": split.left_out,
        "prompts_on_both_sides": prompts_on_both_sides(split),
    }


def set_reference(model: Any, sides: dict[str, KtoSide], folder: RunFolder, config: DpoConfig, world: World) -> None:
    """Set the log-probabilities under the initial weights on each side: those of the run folder, or computed ones."""

    def compute() -> dict[str, Tensor]:
        parts = {f"{name}{suffix}": part for name, side in sides.items() for suffix, part in _parts(side)}
        return {name: measure_logprobs(model, part, config.microbatch_tokens, world) for name, part in parts.items()}

    kept = load_or_compute_reference(folder, compute, world)
    for name, side in sides.items():
        side.ref_logprobs, side.mismatched_ref_logprobs = (
            kept[f"{name}{suffix}"].to(unwrap_model(model).device) for suffix, _ in _parts(side)
        )


def _parts(side: KtoSide) -> tuple[tuple[str, list[Example]], tuple[str, list[Example]]]:
    return ("", side.examples), ("_mismatched", side.mismatched)


def estimate_kl(model: Any, side: KtoSide, rows: Sequence[int], config: DpoConfig, world: World) -> float:
    """Estimate the KL of the policy to the reference in nats: the mean log-ratio of the mismatched pairs, at least 0.

    Without gradients. Every process must call it with the same rows, and measures a share of them.
    """
    pairs = [side.mismatched[row] for row in rows]
    logprobs = measure_logprobs(model, pairs, config.microbatch_tokens, world)
    ratios = logprobs - side.mismatched_ref_logprobs[torch.as_tensor(rows, device=logprobs.device)].to(logprobs)
    return max(0.0, float(ratios.double().mean()))


def label_losses(logprobs: Tensor, side: KtoSide, rows: Sequence[int], kl: float, config: DpoConfig) -> Tensor:
    """Compute the loss of each labelled response times its weights, from its log-probability. [N] -> [N]

    Args:
        kl: estimate of the KL to the reference, in nats.
    """
    index = torch.as_tensor(rows, device=logprobs.device)
    desirable = side.desirable.to(logprobs.device)[index]
    rewards = implicit_rewards(logprobs, side.ref_logprobs.to(logprobs)[index], config.beta)
    losses = kto_loss(rewards, desirable, logprobs.new_tensor(config.beta * kl))
    by_kind = torch.where(desirable, config.desirable_weight, config.undesirable_weight)
    return by_kind * logprobs.new_tensor([side.labels[row].weight for row in rows]) * losses


def evaluate_labels(model: Any, side: KtoSide, config: DpoConfig, world: World) -> dict[str, float]:
    """Compute metrics of the implicit rewards on responses that are not trained on. Empty without any.

    The accuracy is the share of responses on the right side of the reference point; those on it count half. A mean over
    a kind that the held-out rows lack is NaN.
    """
    if not side.labels:
        return {}
    rows = range(len(side.labels))
    logprobs = measure_logprobs(model, side.examples, config.microbatch_tokens, world)
    kl = estimate_kl(model, side, rows, config, world)
    losses = label_losses(logprobs, side, rows, kl, config)
    desirable, rewards = side.desirable, implicit_rewards(logprobs, side.ref_logprobs.to(logprobs), config.beta)
    excess = torch.where(desirable, rewards - config.beta * kl, config.beta * kl - rewards)
    chosen, rejected = float(rewards[desirable].mean()), float(rewards[~desirable].mean())
    return {
        "loss": float(losses.sum()) / sum(label.weight for label in side.labels),
        "accuracy": float(((excess.sign() + 1) / 2).mean()),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "chosen_logprob": float(logprobs[desirable].mean()),
        "forward_kl": float((side.ref_logprobs.to(logprobs) - logprobs).mean()),
        "kl": kl,
    }
