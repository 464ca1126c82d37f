"""Make one batch, and measure keel's objectives on it: python keel_objectives.py JOB.json RESULT.json

The result has the loss and the gradient norm of every objective. The batch and a sample of each gradient are written
beside the job.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from objective_cases import LENGTH_LIMIT
from safetensors.torch import save_file
from torch import Tensor

from keel.config import DpoConfig, RewardConfig, TrainConfig, parse
from keel.data.batches import TrainingBatch
from keel.data.labels import LabelledResponse
from keel.data.notes import Notes
from keel.data.padding import pad_rows
from keel.data.preferences import Ranking, load_rankings
from keel.learn.algorithms import ALGORITHMS
from keel.learn.optim import gradient_norm
from keel.models.actor_critic import ActorCritic
from keel.models.loading import end_token_ids, load_causal_lm, load_tokenizer
from keel.models.reward_model import RewardModel
from keel.supervised.dpo import DpoSplit, dpo_task, encode_side
from keel.supervised.kto import KtoSide, encode_labels, kto_task
from keel.supervised.loop import accumulate
from keel.supervised.ranking_task import encode_rankings, reward_task
from keel.supervised.response_logprobs import measure_logprobs
from keel.supervised.reward import draw_head
from keel.supervised.sft import target_losses
from keel.supervised.split import Split
from keel.training.update_setup import build_updater
from keel.world import World

LENGTHS = (12, 20, 15, 17, 13, 19, 14, 18)
ADVANTAGES = (1.3, -0.4, 0.2, -1.1, 0.9, -0.7, 1.6, -0.3)
MARGINS = (0.0, 0.5, 1.0, 0.25)
TOKENS = 4096  # of a micro-batch: all rows
NO_STEP = 1e-30  # learning rate at which no float32 weight changes
Measured = dict[str, float]


class Side:
    """The model, and the batch in keel's types."""

    def __init__(self, model: str, pairs: str, seed: int) -> None:
        self.folder, self.world = model, World.from_environment()
        self.model, self.tokenizer = load_causal_lm(model), load_tokenizer(model)
        self.ends = end_token_ids(self.model, self.tokenizer)
        self.pairs_file, generator = pairs, torch.Generator().manual_seed(seed)
        reference = perturbed(self.model, generator)
        self.rankings = short_rankings(load_rankings(pairs))
        self.policy = self.policy_batch(reference, load_rankings(pairs), generator)
        self.pairs = self.encode_pairs(self.rankings, reference)
        self.short = self.encode_pairs([replace(each, prompt="Why") for each in self.rankings], reference)
        self.labels = self.encode_labels(reference)
        del reference
        self.scored = [replace(each, margin=margin) for each, margin in zip(self.rankings, MARGINS, strict=True)]

    def policy_batch(self, reference: Any, rankings: list[Ranking], generator: torch.Generator) -> TrainingBatch:
        """Return two groups of four responses, from the texts of the file, with old log-probs that differ by noise."""
        prompts = [each.prompt for each in self.rankings[:2] for _ in range(4)]
        texts = [ids for each in rankings if len(ids := self.tokenizer.encode(each.responses[1])) >= max(LENGTHS)]
        prompt_tokens, prompt_mask = pad_rows([self.tokenizer.encode(prompt) for prompt in prompts], 0, "left")
        response_tokens, mask = pad_rows([texts[i][:length] for i, length in enumerate(LENGTHS)], 0)
        zeros = torch.zeros(mask.shape)
        advantages = torch.tensor(ADVANTAGES).unsqueeze(1) * mask
        batch = TrainingBatch(
            prompt_tokens, prompt_mask, response_tokens, mask, zeros, zeros + 1, *[zeros] * 3, advantages, zeros
        )
        with torch.no_grad():
            current, ref = (ActorCritic(each).analyze(batch, 1.0).logprobs for each in (self.model, reference))
        self.current = current
        noise = 0.3 * torch.randn(mask.shape, generator=generator) * mask
        return replace(batch, logprobs=current + noise, ref_logprobs=ref)

    def encode_pairs(self, rankings: list[Ranking], reference: Any) -> DpoSplit:
        side = encode_side(rankings, self.tokenizer, self.ends, TOKENS, Notes())
        side.reference = side.split(measure_logprobs(reference, side.all_responses, TOKENS, self.world))
        return side

    def encode_labels(self, reference: Any) -> KtoSide:
        texts = [(each.prompt, text, place == 0) for each in self.rankings for place, text in enumerate(each.responses)]
        side = encode_labels(
            [LabelledResponse(*each) for each in texts[:-1]], self.tokenizer, self.ends, TOKENS, Notes()
        )  # four desirable, three not
        side.ref_logprobs = measure_logprobs(reference, side.examples, TOKENS, self.world)
        side.mismatched_ref_logprobs = measure_logprobs(reference, side.mismatched, TOKENS, self.world)
        return side

    def written(self) -> dict[str, Any]:
        """Return the batch as lists."""
        batch, mask = self.policy, self.policy.response_mask
        prompts = [ids[keep].tolist() for ids, keep in zip(batch.prompt_tokens, batch.prompt_mask, strict=True)]
        rows = (batch.response_tokens, batch.logprobs, self.current, batch.ref_logprobs)
        responses, old, current, ref = ([row[keep].tolist() for row, keep in zip(x, mask, strict=True)] for x in rows)
        lists = {"prompts": prompts, "responses": responses, "old": old, "current": current, "ref": ref}
        labels = zip(
            self.labels.examples,
            self.labels.mismatched,
            self.labels.labels,
            self.labels.ref_logprobs.tolist(),
            self.labels.mismatched_ref_logprobs.tolist(),
            strict=True,
        )
        return {
            "policy": {**lists, "advantages": ADVANTAGES},
            "pairs": written_pairs(self.pairs),
            "one-token prompts": written_pairs(self.short),
            "labels": [
                {
                    "prompt_ids": example.tokens[: example.num_prompt_tokens],
                    "completion_ids": example.tokens[example.num_prompt_tokens :],
                    "KL_completion_ids": mismatched.tokens[mismatched.num_prompt_tokens :],
                    "label": label.is_desirable,
                    "ref_logps": ref,
                    "ref_KL_logps": mismatched_ref,
                }
                for example, mismatched, label, ref, mismatched_ref in labels
            ],
        }

    def measure_policy(self, case: Mapping[str, Any]) -> Measured:
        """Run one update of `keel train`, without effect on the weights."""
        values = {
            "output": "none",
            "steps": 1,
            "policy": {"model": self.folder},
            "prompts": {"path": self.pairs_file},
            "rollout": {"batch_size": 8, "group_size": 4, "max_response_tokens": LENGTH_LIMIT},
            "rewards": [{"function": "rewards.py:share_of_letters"}],
            "algorithm": {**case["keel"], "minibatch_size": 8, "microbatch_tokens": TOKENS},
            "optim": {"learning_rate": NO_STEP, "schedule": "constant"},
        }
        config = parse(TrainConfig, values)
        updater = build_updater(config, ActorCritic(self.model), ALGORITHMS[config.algorithm.name], self.world)
        batch = replace(self.policy, logprobs=self.current) if case["on_policy"] else self.policy
        metrics = updater.update(batch, 1, config.algorithm.kl_coef, 0)
        bonus = config.algorithm.entropy_coef * metrics["policy/entropy"]
        loss = metrics["loss/policy"] + metrics.get("loss/kl", 0.0) - bonus
        return {"loss": loss, "norm": metrics["policy/grad_norm"], "clipped": metrics["policy/clipfrac"]}

    def measure_pairs(self, case: Mapping[str, Any]) -> Measured:
        if case["trainer"] == "SFT":
            chosen = [responses[0] for responses in self.pairs.responses]
            loss = target_losses(self.model, chosen).sum() / sum(each.num_targets for each in chosen)
            loss.backward()
            return {"loss": float(loss.detach()), "norm": float(gradient_norm(list(self.model.parameters())))}
        config = parse(DpoConfig, {**self.supervised(), **case["keel"]})
        side = self.short if case["rows"] == "one-token prompts" else self.pairs
        split = Split(side.rankings, [], side.rankings)
        sides = {"train": side, "watched": DpoSplit([], []), "held_out": side}
        task = dpo_task(config, self.model, self.tokenizer, split, sides, self.world)
        return self.measure_task(task, len(side.rankings))

    def measure_labels(self, case: Mapping[str, Any]) -> Measured:
        config, side = parse(DpoConfig, {**self.supervised(), **case["keel"]}), self.labels
        split = Split(side.labels, [], side.labels)
        sides = {"train": side, "watched": KtoSide([], [], []), "held_out": side}
        task = kto_task(config, self.model, self.tokenizer, split, sides, self.world)
        return {**task.start_step(range(len(side.labels))), **self.measure_task(task, len(side.labels))}

    def measure_task(self, task: Any, num_rows: int) -> Measured:
        """Compute the gradient of a step of the supervised loop, and its norm as the step does before it clips."""
        loss = accumulate(task, range(num_rows), TOKENS, self.world)
        return {"loss": loss, "norm": float(gradient_norm(list(task.model.parameters())))}

    def supervised(self) -> dict[str, Any]:
        return {"output": "none", "model": self.folder, "data": {"path": self.pairs_file}, "microbatch_tokens": TOKENS}


def perturbed(model: Any, generator: torch.Generator) -> Any:
    """Return a copy of the model, each matrix with noise of 2% of its deviation."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for weight in (weight for weight in reference.parameters() if weight.dim() > 1):
            weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    return reference


def short_rankings(rankings: list[Ranking]) -> list[Ranking]:
    """Return the first four pairs with different prompts, whose responses have at most 120 characters."""
    short = [each for each in rankings if max(map(len, each.responses)) <= 120]
    first = {str(each.prompt): each for each in reversed(short)}
    return list(reversed(first.values()))[:4]


def written_pairs(side: DpoSplit) -> list[dict[str, Any]]:
    rows = []
    for (chosen, rejected), reference in zip(side.responses, side.reference, strict=True):
        start = chosen.num_prompt_tokens
        rows.append(
            {
                "prompt_ids": chosen.tokens[:start],
                "chosen_ids": chosen.tokens[start:],
                "rejected_ids": rejected.tokens[start:],
                "ref_chosen_logps": float(reference[0]),
                "ref_rejected_logps": float(reference[1]),
            }
        )
    return rows


@contextmanager
def gradient_samples(model: Any) -> Iterator[dict[str, Tensor]]:
    """Copy the first four rows of each gradient inside, vectors in full, before the optimizer frees it."""
    samples: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            samples[name] = (weight.grad[:4] if weight.dim() > 1 else weight.grad).clone()

        return hook

    hooks = [weight.register_post_accumulate_grad_hook(keep(name)) for name, weight in model.named_parameters()]
    yield samples
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)


def measure_rewards(side: Side, cases: list[dict[str, Any]], samples: dict[str, Tensor]) -> tuple[Any, Any]:
    """Measure the cases of a reward model. Return the rows and the head that the other side needs, and the results."""
    model = RewardModel.load(side.folder, template="{prompt}{response}", max_tokens=TOKENS)
    with torch.no_grad():
        draw_head(model, 0)
    results = {}
    for case in cases:
        values = {**side.supervised(), "max_tokens": TOKENS, **case["keel"]}
        task = reward_task(parse(RewardConfig, values), model, Split(side.scored, [], side.scored), side.world)
        with gradient_samples(model.model) as taken:
            results[case["name"]] = side.measure_task(task, len(side.scored))
        samples |= {f"{case['name']}/{name}": sample for name, sample in taken.items()}
    encoded = encode_rankings(model, side.scored, TOKENS, Notes(bare=False))[0]
    rows = [
        {"chosen_ids": each.rows[0], "rejected_ids": each.rows[1], "margin": each.ranking.margin} for each in encoded
    ]
    return {"rows": rows, "head": model.head.weight.tolist()}, results


def main(job_file: str, result_file: str) -> None:
    job, folder = json.loads(Path(job_file).read_text()), Path(job_file).parent
    torch.set_num_threads(job["threads"])
    side, samples, results = Side(job["model"], job["pairs"], job["seed"]), {}, {}
    measures = {"policy": side.measure_policy, "labels": side.measure_labels}
    for case in job["cases"]:
        if case["rows"] == "scored pairs":
            continue
        with gradient_samples(side.model) as taken:
            results[case["name"]] = measures.get(case["rows"], side.measure_pairs)(case)
        samples |= {f"{case['name']}/{name}": sample for name, sample in taken.items()}
    scored = [case for case in job["cases"] if case["rows"] == "scored pairs"]
    written, of_rewards = measure_rewards(side, scored, samples) if scored else ({}, {})
    (folder / "batch.json").write_text(json.dumps({**side.written(), "scored pairs": written}))
    save_file(samples, folder / "keel.safetensors")
    Path(result_file).write_text(json.dumps({**results, **of_rewards}))


if __name__ == "__main__":
    main(*sys.argv[1:])
