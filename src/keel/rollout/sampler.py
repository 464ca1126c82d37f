"""Batched sampling of responses, with a mask of the tokens that were sampled.

Each token comes from one uniform number of the caller, through the inverse of the cumulative distribution. A row's
response therefore depends only on its numbers, not on the rest of the batch or on rows that finish early.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from keel import kernels
from keel.core.logprobs import token_logprobs
from keel.data.batches import Rollouts
from keel.data.chats import hidden_ids
from keel.data.padding import pad_rows
from keel.data.prompts import Prompt
from keel.models.heads import compute_values, next_token_logits, unwrap_model
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
    value_head: nn.Module | None = None,
) -> Rollouts:
    """Sample one response to each prompt.

    A response ends with the first token that is in `end_ids` or completes one of `stop_texts`. This token is part of
    the response. Responses without such a token are truncated. Finished rows leave the batch at once, and a prompt in
    adjacent rows is read once.

    Args:
        uniforms: [B, T] in [0, 1), one number per token. T is the largest number of tokens.
        value_head: computes values from the states of the tokens, which saves the trainer a pass.
        stop_in_text: whether the text of an end that is ordinary text, such as ".", is part of the response's text.
    """
    device = unwrap_model(model).device
    pad_id = fill_id(model, tokenizer)
    prompt_tokens, prompt_mask = (x.to(device) for x in pad_rows([p.tokens for p in prompts], pad_id, side="left"))
    ends = Ends(tokenizer, end_ids, stop_texts, device)
    values = Values(value_head, len(prompts), uniforms.shape[1], device) if value_head is not None else None
    responses, logprobs, lengths, truncated = generate(
        model, prompts, prompt_tokens, prompt_mask, uniforms.to(device), ends, pad_id, temperature, top_k, top_p, values
    )
    width = int(lengths.max())
    responses, logprobs = responses[:, :width], logprobs[:, :width]
    response_mask = torch.arange(width, device=device) < lengths.unsqueeze(1)
    texts = decode_responses(tokenizer, prompts, responses, response_mask, truncated, stop_in_text, ends)
    rollouts = Rollouts(prompts, prompt_tokens, prompt_mask, responses, response_mask, logprobs, truncated, texts)
    if values is None:
        return rollouts
    return replace(rollouts, value_outputs=values.before[:, :width], final_outputs=values.last)


class Values:
    """Outputs of a value head while `limit` tokens of `count` responses are sampled."""

    def __init__(self, head: nn.Module, count: int, limit: int, device: torch.device) -> None:
        dtype = torch.promote_types(next(head.parameters()).dtype, torch.float32)
        self.head, self.before = head, torch.zeros(count, limit, dtype=dtype, device=device)
        self.last = torch.zeros(count, dtype=dtype, device=device)

    def record(self, states: Tensor, rows: Tensor, t: int) -> None:
        """Compute the values of the states [n, H] before token t of these rows [n]; after the last one at the limit."""
        outputs = compute_values(self.head, states)
        if t < self.before.shape[1]:
            self.before[rows, t] = outputs
        else:
            self.last[rows] = outputs


def generate(
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
    values: Values | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample the responses token by token. -> tokens [B, T], their log-probs [B, T], lengths [B], truncated [B]"""
    count, limit = uniforms.shape
    responses = torch.full((count, limit), pad_id, device=uniforms.device)
    logprobs = torch.zeros((count, limit), device=uniforms.device)
    lengths = torch.full((count,), limit, device=uniforms.device)
    truncated = torch.ones(count, dtype=torch.bool, device=uniforms.device)
    copies = count_copies(prompts)
    decoder = choose_decoder(model, limit)
    states = decoder.start(prompt_tokens[::copies], prompt_mask[::copies], copies)
    active = torch.arange(count, device=uniforms.device)  # the response that each row of the decoder belongs to
    for t in range(limit):
        if values is not None:
            values.record(states, active, t)
        logits = next_token_logits(model, states)
        chosen, logprob = choose_tokens(logits, uniforms[active, t], temperature, top_k, top_p)
        responses[active, t], logprobs[active, t] = chosen, logprob
        ended = ends.rows_at_end(responses[active, max(0, t + 1 - ends.window) : t + 1])
        if bool(ended.any()):
            lengths[active[ended]], truncated[active[ended]] = t + 1, False
            rows = remaining_rows(ended)
            active, chosen = active[rows], chosen[rows]
            decoder.keep(rows)
        if not len(active) or (t + 1 == limit and values is None):
            break
        states = decoder.advance(chosen)
    if values is not None and len(active):
        values.record(states, active, limit)
    return responses, logprobs, lengths, truncated


def count_copies(prompts: Sequence[Prompt]) -> int:
    """Return the number of adjacent rows that share a prompt object, if it is the same for all prompts, else 1."""
    first = next((i for i, prompt in enumerate(prompts) if prompt is not prompts[0]), len(prompts))
    divides = len(prompts) % first == 0
    alike = all(prompt is prompts[i - i % first] for i, prompt in enumerate(prompts))
    return first if divides and alike else 1


def remaining_rows(ended: Tensor) -> Tensor:
    """Return the rows that have not ended. [B] -> [n]

    Rows from the back take the places of those that ended, so that few rows have to move.
    """
    active = ~ended
    count = int(active.sum())
    rows = torch.arange(count, device=ended.device)
    rows[ended[:count]] = active[count:].nonzero().squeeze(1) + count
    return rows


def choose_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution at `uniforms`. [B, V], [B] -> tokens [B], their log-probabilities [B]

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
    """Set the logits to -inf except for the k most likely tokens and the smallest set with probability p.

    For evaluation only: training needs the probabilities of the full distribution.
    """
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
    """Return the text that each response adds to its decoded prompt, with a leading space if there is one.

    End tokens that are special or added to the vocabulary are never text. Other ends are text if `stop_in_text`.
    """
    markers = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def text(prompt: Prompt, row: list[int], is_cut: bool) -> str:
        by_text = ends is not None and row[-1] not in ends.ids
        if is_cut or (stop_in_text and (by_text or row[-1] not in markers)):
            return continuation(tokenizer, prompt.tokens, row)
        without_end = continuation(tokenizer, prompt.tokens, row[:-1])
        if ends is None or not by_text:
            return without_end
        return ends.strip_stop_text(continuation(tokenizer, prompt.tokens, row), len(without_end))

    rows = [row[counted].tolist() for row, counted in zip(responses.cpu(), mask.cpu(), strict=True)]
    return [text(*each) for each in zip(prompts, rows, truncated.tolist(), strict=True)]


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text that `tokens` add to the text of `prompt`.

    It includes special tokens that the assistant may write, since chats in training and scoring data include them.
    """
    hidden = hidden_ids(tokenizer)
    start, full = (
        str(tokenizer.decode([token for token in ids if token not in hidden])) for ids in (prompt, [*prompt, *tokens])
    )
    if full.startswith(start):
        return full[len(start) :]
    return str(tokenizer.decode([token for token in tokens if token not in hidden]))
