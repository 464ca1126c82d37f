"""Prompts in, answers out: batched sampling that leaves no doubt which tokens were sampled.

Each token takes one uniform number, given by the caller, through the inverse of the cumulative distribution. So a
row's answer depends on its own numbers alone: not on the batch around it, and not on the rows that finish early.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keel import kernels
from keel.core.logprobs import token_logprobs
from keel.data.batches import Rollouts
from keel.data.chats import hidden_ids
from keel.data.padding import pad_rows
from keel.data.prompts import Prompt
from keel.models.heads import next_token_logits, plain
from keel.models.vocabulary import fill_id
from keel.rollout.decoding.decoder import choose_decoder
from keel.rollout.ends import Ends


@torch.no_grad()
def sample_rollouts(
    model: Any,
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    uniforms: Tensor,
    end_ids: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_in_text: bool = True,
    stop_texts: Sequence[str] = (),
) -> Rollouts:
    """One answer to each prompt; `uniforms` [B, T] in [0, 1) sets their number of tokens and decides each of them.

    A row ends with the first token of `end_ids`, or the one that completes one of `stop_texts`, which is part of the
    response; rows without one are truncated. With `stop_in_text` the text of an end that is ordinary text (such as ".")
    is part of the response's text.
    Finished rows leave the batch at once, and a prompt that stands in adjacent rows is read once.
    """
    device = plain(model).device
    pad_id = fill_id(model, tokenizer)
    prompt_tokens, prompt_mask = (
        part.to(device) for part in pad_rows([p.tokens for p in prompts], pad_id, side="left")
    )
    ends = Ends(tokenizer, end_ids, stop_texts, device)
    responses, logprobs, lengths, truncated = grow(
        model, prompts, prompt_tokens, prompt_mask, uniforms.to(device), ends, pad_id, temperature, top_k, top_p
    )
    width = int(lengths.max())
    responses, logprobs = responses[:, :width], logprobs[:, :width]
    response_mask = torch.arange(width, device=device) < lengths.unsqueeze(1)
    texts = decode_responses(tokenizer, prompts, responses, response_mask, truncated, stop_in_text, ends)
    return Rollouts(prompts, prompt_tokens, prompt_mask, responses, response_mask, logprobs, truncated, texts)


def grow(
    model: Any,
    prompts: Sequence[Prompt],
    prompt_tokens: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    ends: Ends,
    pad_id: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The answers token by token -> tokens [B, T], their log-probs [B, T], lengths [B], truncated [B]."""
    count, limit = uniforms.shape
    responses = torch.full((count, limit), pad_id, device=uniforms.device)
    logprobs = torch.zeros((count, limit), device=uniforms.device)
    lengths = torch.full((count,), limit, device=uniforms.device)
    truncated = torch.ones(count, dtype=torch.bool, device=uniforms.device)
    copies = repeats(prompts)
    decoder = choose_decoder(model, limit)
    states = decoder.start(prompt_tokens[::copies], prompt_mask[::copies], copies)
    active = torch.arange(count, device=uniforms.device)  # which answer each of the decoder's rows is
    for t in range(limit):
        logits = next_token_logits(model, states)
        chosen, logprob = choose(logits, uniforms[active, t], temperature, top_k, top_p)
        responses[active, t], logprobs[active, t] = chosen, logprob
        ended = ends.rows_at_end(responses[active, max(0, t + 1 - ends.window) : t + 1])
        if bool(ended.any()):
            lengths[active[ended]], truncated[active[ended]] = t + 1, False
            rows = without(ended)
            active, chosen = active[rows], chosen[rows]
            decoder.keep(rows)
        if t + 1 == limit or not len(active):
            break
        states = decoder.advance(chosen)
    return responses, logprobs, lengths, truncated


def repeats(prompts: Sequence[Prompt]) -> int:
    """How often each prompt stands in a row, if all do equally often, else 1: so often is it read but once."""
    first = next((i for i, prompt in enumerate(prompts) if prompt is not prompts[0]), len(prompts))
    whole = len(prompts) % first == 0
    alike = all(prompt is prompts[i - i % first] for i, prompt in enumerate(prompts))
    return first if whole and alike else 1


def without(ended: Tensor) -> Tensor:
    """The rows that go on [n], where rows from the back fill the places of those that ended: few have to move."""
    going = ~ended
    count = int(going.sum())
    rows = torch.arange(count, device=ended.device)
    rows[ended[:count]] = going[count:].nonzero().squeeze(1) + count
    return rows


def choose(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Tokens by inverting the cumulative distribution at `uniforms`, and their log-probabilities. [B, V], [B] -> [B]

    Temperature 0 takes the most likely token, with its log-probability at temperature 1.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, token_logprobs(logits, tokens, 1.0)
    if top_k or top_p < 1.0:
        logits, temperature = keep_likely(logits / temperature, top_k, top_p), 1.0
    if kernels.available(logits):
        return kernels.draw(logits, uniforms.double(), temperature)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    points = uniforms.double().unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, points, right=True).clamp(max=logits.shape[-1] - 1).squeeze(1)
    return tokens, token_logprobs(logits, tokens, temperature)


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for all but the k most likely tokens and the smallest set that holds probability p (for evaluation)."""
    if top_k:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


def decode_responses(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    responses: Tensor,
    mask: Tensor,
    truncated: Tensor,
    stop_in_text: bool = True,
    ends: Ends | None = None,
) -> list[str]:
    """Return the responses as text: what each adds to its decoded prompt, so that a leading space is kept.

    End tokens that are special or added to the vocabulary are never text; other ends are with `stop_in_text`.
    """
    markers = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def text(prompt: Prompt, row: list[int], is_cut: bool) -> str:
        by_text = ends is not None and row[-1] not in ends.ids
        if is_cut or (stop_in_text and (by_text or row[-1] not in markers)):
            return continuation(tokenizer, prompt.tokens, row)
        before = continuation(tokenizer, prompt.tokens, row[:-1])
        return ends.without(continuation(tokenizer, prompt.tokens, row), len(before)) if ends and by_text else before

    rows = [row[counted].tolist() for row, counted in zip(responses.cpu(), mask.cpu(), strict=True)]
    return [text(*each) for each in zip(prompts, rows, truncated.tolist(), strict=True)]


def continuation(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add after `before`. Special tokens that the assistant may write are part of it: a chat
    that is learned or scored holds them too."""
    hidden = hidden_ids(tokenizer)
    start, whole = (
        str(tokenizer.decode([token for token in ids if token not in hidden])) for ids in (before, [*before, *tokens])
    )
    if whole.startswith(start):
        return whole[len(start) :]
    return str(tokenizer.decode([token for token in tokens if token not in hidden]))
