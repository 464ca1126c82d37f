"""Run each verb of keel with a tiny model of a family, and compare results with plain transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from keel.config import DpoConfig, EvaluateConfig, RewardConfig, SftConfig, parse
from keel.data.prompts import Prompt
from keel.evaluation.evaluate import evaluate_policies
from keel.models.gradients import require_gradients
from keel.models.heads import token_statistics, trunk
from keel.models.layers import has_known_layers
from keel.models.loading import load_causal_lm, load_tokenizer
from keel.models.packed import reads_packed_rows, reads_single_rows, token_states
from keel.models.pad_token import read_every_token
from keel.rollout.decoding.module_decoder import FullDecoder, module_decoder
from keel.rollout.sampler import sample_rollouts
from keel.supervised.dpo import dpo
from keel.supervised.reward import reward
from keel.supervised.sft import sft
from keel.training.policy import train_policy

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13"]
TOKENS = 12  # of a response: more than a small window has
OPTIM = {"learning_rate": 1e-3, "schedule": "constant"}
LORA = {"r": 2, "alpha": 4, "target_modules": "all-linear"}


def length_of_words(completions: list[str], **_: Any) -> list[float]:
    """Return a reward that differs between responses."""
    return [float(len(text)) for text in completions]


def ways(model: Any) -> dict[str, str]:
    """Describe how keel lays out rows for the model, and how it decodes."""
    reading = "one by one" if reads_single_rows(model) else "packed" if reads_packed_rows(model) else "padded"
    if has_known_layers(trunk(model)):
        return {"reading": reading, "decoding": "layers"}
    return {"reading": reading, "decoding": "again" if isinstance(module_decoder(model), FullDecoder) else "cache"}


def answers(folder: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """Load a model with keel, and return it with two responses to each of PROMPTS."""
    model, tokenizer = load_causal_lm(str(folder), dtype), load_tokenizer(str(folder))
    prompts = [Prompt(text, text, tokenizer(text).input_ids, {}) for text in PROMPTS]
    pairs = [prompt for prompt in prompts for _ in range(2)]
    numbers = torch.rand(len(pairs), TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, sample_rollouts(model, pairs, tokenizer, numbers, [2])


def plain_logprobs(model: Any, rollouts: Any) -> Tensor:
    """Return log-probabilities of the same tokens under plain transformers, row by row. -> [mask.sum()]"""
    found = []
    for row in range(len(rollouts.texts)):
        before = rollouts.prompt_tokens[row][rollouts.prompt_mask[row]]
        after = rollouts.response_tokens[row][rollouts.response_mask[row]]
        logits = model(input_ids=torch.cat([before, after]).unsqueeze(0), use_cache=False).logits[0]
        law = logits[len(before) - 1 : -1].float().log_softmax(-1)
        found.append(law.gather(1, after.unsqueeze(1)).squeeze(1))
    return torch.cat(found)


def compare(folder: Path) -> dict[str, Any]:
    """Return the largest difference of log-probs in float32 and of gradients, each in units of its largest value."""
    model, rollouts = answers(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read_every_token(plain)  # a pad token that was sampled is text, and learns
    exact = plain_logprobs(plain, rollouts)
    found: dict[str, Any] = {**ways(model), "float32": _largest_gap(rollouts, exact)}
    found["gradient"] = gradient_gap(model, plain, rollouts, exact)
    return {name: value if isinstance(value, str) else float(value) for name, value in found.items()}


@torch.no_grad()
def compare_bfloat16(folder: Path) -> dict[str, float]:
    """Return the mean difference of log-probs in bfloat16 from float32, of the sampler and of plain transformers."""
    require_gradients(load_causal_lm(str(folder), "bfloat16"), "bfloat16")
    _, rollouts = answers(folder, "bfloat16")
    plain, half = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16)
    )
    exact = plain_logprobs(plain, rollouts)
    gaps = {"bfloat16": rollouts.logprobs[rollouts.response_mask], "bfloat16_plain": plain_logprobs(half, rollouts)}
    return {name: float(_gap(logprobs, exact).mean()) for name, logprobs in gaps.items()}


def gradient_gap(model: Any, plain: Any, rollouts: Any, exact: Tensor) -> Tensor:
    """Compare gradients of the sum of log-probs: keel over the batch, plain transformers row by row."""
    require_gradients(model, "model")
    exact.sum().backward()
    tokens = torch.cat([rollouts.prompt_tokens, rollouts.response_tokens], 1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.response_mask], 1)
    is_response = torch.cat([torch.zeros_like(rollouts.prompt_mask), rollouts.response_mask], 1)[mask]
    before = is_response.nonzero().squeeze(1) - 1
    chosen = rollouts.response_tokens[rollouts.response_mask]
    token_statistics(model, token_states(model, tokens, mask)[before], chosen)[0].sum().backward()
    ours, theirs = (
        {name: weight.grad for name, weight in each.named_parameters() if weight.grad is not None}
        for each in (model, plain)
    )
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    names = ours.keys() | theirs.keys()
    zero = torch.zeros(())
    return max(_gap(ours.get(name, zero), theirs.get(name, zero)).max() for name in names) / max(largest, 1e-9)


def _largest_gap(rollouts: Any, exact: Tensor) -> Tensor:
    """Return the largest difference in units of the largest log-prob (at least 1), as rounding errors scale with it."""
    return _gap(rollouts.logprobs[rollouts.response_mask], exact).max() / max(1.0, float(exact.detach().abs().max()))


def _gap(one: Tensor, other: Tensor) -> Tensor:
    return (one.detach() - other.detach()).abs()


def verbs(folder: Path, work: Path) -> dict[str, Callable[[], Any]]:
    """Return verb -> function that runs it."""
    rows = [{"prompt": text, "completion": " w20 w21", "chosen": " w20 w21", "rejected": " w22"} for text in PROMPTS]
    data, prompts = work / "rows.jsonl", work / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS), encoding="utf-8")
    common = {"model": str(folder), "data": {"path": str(data)}, "batch_size": 4, "optim": OPTIM}
    supervised = {"sft": (sft, SftConfig), "reward": (reward, RewardConfig), "dpo": (dpo, DpoConfig)}
    found: dict[str, Callable[[], Any]] = {
        name: lambda run=run, kind=kind, name=name: run(parse(kind, {**common, "output": str(work / name)}))
        for name, (run, kind) in supervised.items()
    }
    policies: dict[str, dict[str, Any]] = {
        "ppo": {},
        "ppo shared": {"critic": {"sharing": "shared"}},
        "grpo lora": {
            "algorithm": {"name": "grpo"},
            "policy": {"model": str(folder), "lora": LORA},
        },
    }
    found |= {name: lambda name=name: policy(folder, work, name, policies[name]) for name in policies}
    sampling = {"max_response_tokens": 4, "num_responses": 2}
    settings = {"policy": str(folder), "against": str(folder), "prompts": {"path": str(prompts)}, "sampling": sampling}
    found["evaluate"] = lambda: evaluate_policies(parse(EvaluateConfig, settings), [length_of_words])
    return found


def policy(folder: Path, work: Path, name: str, changes: dict[str, Any]) -> dict[str, float]:
    """Run one step of policy learning."""
    settings = {
        "output": str(work / name.replace(" ", "-")),
        "steps": 1,
        "policy": {"model": str(folder)},
        "prompts": {"path": "given"},
        "rollout": {"batch_size": 8, "max_response_tokens": TOKENS},
        "algorithm": {"update_epochs": 1},
        "optim": OPTIM,
        "checkpoint": {"every": 0},
        "doctor": "quiet",
    }
    settings |= {key: {**settings.get(key, {}), **value} for key, value in changes.items()}
    if name.startswith("grpo"):
        settings["rollout"] = {**settings["rollout"], "group_size": 4}
    return train_policy(settings, [length_of_words], PROMPTS)


@torch.no_grad()
def saved_gap(result: Path) -> float:
    """Return the largest difference of log-probs between a saved model loaded by keel and by plain transformers."""
    _, rollouts = answers(result)
    plain = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
    return float(_largest_gap(rollouts, plain_logprobs(plain, rollouts)))
