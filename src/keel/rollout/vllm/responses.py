"""Requests for responses, and the check of the replies. What cannot be right raises EngineError."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keel.data.batches import Rollouts
from keel.data.padding import pad_rows
from keel.data.prompts import Prompt
from keel.errors import EngineError
from keel.rollout.sampler import decode_responses

WHERE = "vLLM"
FIX = "use rollout.engine: keel, and report this"


@dataclass(frozen=True)
class ResponseRules:
    """How responses are sampled."""

    max_response_tokens: int
    temperature: float
    stop_in_text: bool
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """One response as the engine sampled it."""

    tokens: list[int]
    logprobs: list[float]
    truncated: bool


def completion_request(
    prompt: Prompt, seed: int, max_tokens: int, end_ids: Sequence[int], rules: ResponseRules
) -> dict[str, Any]:
    """Return the body of a request for one response.

    All six fields of sampling are set: a field that is left out has the default of the model's folder. There is one
    request for each response, because several responses of a request, or prompts of a list, share random numbers.
    """
    return {
        "model": "policy",
        "prompt": list(prompt.tokens),
        "max_tokens": max_tokens,
        "seed": seed,
        "temperature": rules.temperature,
        "top_p": rules.top_p,
        "top_k": rules.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,  # the end tokens are those of the run, not those of the model's folder
        "stop_token_ids": list(end_ids),
        "logprobs": 0,
        "return_token_ids": True,
    }


def parse_completion(
    reply: Mapping[str, Any], prompt: Prompt, max_tokens: int, end_ids: Sequence[int], vocabulary: int
) -> Completion:
    """Check the reply to a request, and return the response. Raises EngineError."""
    try:
        (choice,) = reply["choices"]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason, read = choice["finish_reason"], choice["prompt_token_ids"]
    except (KeyError, TypeError, ValueError):
        raise EngineError("the reply of the engine has no tokens or no log-probabilities", WHERE, FIX) from None
    if read != list(prompt.tokens):
        raise EngineError("the engine read another prompt than it was sent", WHERE, FIX)
    if not (isinstance(tokens, list) and isinstance(logprobs, list) and 0 < len(tokens) == len(logprobs)):
        raise EngineError("the engine returned no log-probability for some token", WHERE, FIX)
    if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
        raise EngineError(f"the engine returned a token that is not below {vocabulary}", WHERE, FIX)
    if not all(isinstance(value, int | float) and math.isfinite(value) and value <= 1e-3 for value in logprobs):
        raise EngineError("the engine's log-probabilities are not finite, or above 0", WHERE, FIX)
    _check_end(tokens, reason, max_tokens, end_ids)
    return Completion(tokens, [float(value) for value in logprobs], reason != "stop")


def _check_end(tokens: Sequence[int], reason: Any, max_tokens: int, end_ids: Sequence[int]) -> None:
    """A response ends with its only end token, or has the full length and none. Raises EngineError."""
    ended = tokens[-1] in end_ids
    if len(tokens) > max_tokens or any(token in end_ids for token in tokens[:-1]):
        raise EngineError("the engine did not end a response where it should", WHERE, FIX)
    if ended != (reason == "stop") or reason not in ("stop", "length"):
        raise EngineError(f"the end token and the finish reason {reason!r} disagree", WHERE, FIX)
    if not ended and len(tokens) < max_tokens:
        raise EngineError(f"the engine cut a response at {len(tokens)} of {max_tokens} tokens", WHERE, FIX)


def collect_rollouts(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int,
    stop_in_text: bool,
    device: torch.device,
) -> Rollouts:
    """Put completions into a batch."""
    chosen = list(prompts)
    prompt_tokens, prompt_mask = pad_rows([prompt.tokens for prompt in chosen], pad_id, side="left")
    tokens, mask = pad_rows([completion.tokens for completion in completions], pad_id)
    logprobs: Tensor = torch.zeros(tokens.shape)
    for row, completion in enumerate(completions):
        logprobs[row, : len(completion.tokens)] = torch.tensor(completion.logprobs)
    truncated = torch.tensor([completion.truncated for completion in completions])
    texts = decode_responses(tokenizer, chosen, tokens, mask, truncated, stop_in_text)
    return Rollouts(
        prompts=chosen,
        prompt_tokens=prompt_tokens.to(device),
        prompt_mask=prompt_mask.to(device),
        response_tokens=tokens.to(device),
        response_mask=mask.to(device),
        logprobs=logprobs.to(device),
        truncated=truncated.to(device),
        texts=texts,
    )
