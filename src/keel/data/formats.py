"""The shapes in which comparisons of answers come, in keel and elsewhere; each is known by its columns.

| form | columns |
|---|---|
| rankings | `prompt, responses` and `ranks` or `scores`: keel's own |
| NeMo completions | `context, completions: [{"rank", "completion"}]`, the lowest rank is best |
| OpenAI comparisons | `query, sample0, sample1, ..., best`: one before the rest, as in Ziegler et al. 2019 |
| scored pairs | `chosen, rejected, score_chosen, score_rejected`: UltraFeedback, binarised; equal scores tie |
| pairs | `prompt, chosen, rejected`: TRL's, as texts or as messages |
| transcripts | `chosen, rejected`: whole dialogues with the prompt inside, as in Anthropic's HH data or as messages |
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from keel.data.rows import Content, Messages, Row, reject, require, require_content

ASSISTANT = "\n\nAssistant:"
"""Where the answer begins in a transcript without a column for the prompt (Anthropic's HH data)."""


class Comparison(NamedTuple):
    """What a row says of answers to one prompt."""

    prompt: Content
    responses: tuple[str, ...]
    ranks: tuple[int | None, ...]  # 1 is best, equal numbers tie, None = not ranked
    margin: float = 0.0


def detect_form(row: Row) -> str | None:
    """The name of a row's form, None when its columns belong to no comparison. A column of nulls is none."""
    return _form_with(frozenset(name for name, value in row.values.items() if value is not None))


@lru_cache
def _form_with(columns: frozenset[str]) -> str | None:
    return next((form for form, (marks, _) in FORMS.items() if columns.issuperset(marks)), None)


def read_comparison(row: Row, path: str) -> Comparison:
    """Raises DataError naming file and line."""
    form = detect_form(row)
    if form is None and "prompt" in row.values and not {"chosen", "rejected"} & row.values.keys():
        reject(row, path, f'neither "chosen" and "rejected" nor "responses"; columns: {", ".join(row.values)}')
    _, read = FORMS[form or "transcripts"]
    return read(row, path)


def _ranking(row: Row, path: str) -> Comparison:
    prompt = require_content(row, path, "prompt")
    responses = require_responses(row, path)
    by_rank = row.values.get("ranks") is not None
    if by_rank == (row.values.get("scores") is not None):
        reject(row, path, 'a ranking has either "ranks" (1 is best) or "scores" (higher is better)')
    column = "ranks" if by_rank else "scores"
    marks = require(row, path, column, (list,))
    if len(marks) != len(responses):
        reject(row, path, f'{len(marks)} "{column}" for {len(responses)} responses')
    if not all(mark is None or _is_mark(mark, by_rank) for mark in marks):
        reject(
            row, path, f'"{column}" holds something that is no {"rank from 1" if by_rank else "number"} and not null'
        )
    if by_rank:
        return Comparison(prompt, responses, tuple(None if rank is None else int(rank) for rank in marks))
    return Comparison(prompt, responses, dense_ranks([None if score is None else -score for score in marks]))


def require_responses(row: Row, path: str) -> tuple[str, ...]:
    """At least two answers. Raises DataError."""
    responses = require(row, path, "responses", (list,))
    if len(responses) < 2 or not all(isinstance(response, str) for response in responses):
        reject(row, path, '"responses" is no list of at least two texts')
    return tuple(responses)


def dense_ranks(badness: Sequence[float | None]) -> tuple[int | None, ...]:
    """1 for the lowest number; equal numbers share a rank, None stays."""
    levels = {level: rank for rank, level in enumerate(sorted({bad for bad in badness if bad is not None}), start=1)}
    return tuple(None if bad is None else levels[bad] for bad in badness)


def _is_mark(mark: Any, by_rank: bool) -> bool:
    if isinstance(mark, bool) or not isinstance(mark, int | float) or not math.isfinite(mark):
        return False
    return not by_rank or (mark >= 1 and mark == int(mark))


def _nemo(row: Row, path: str) -> Comparison:
    context, completions = require_content(row, path, "context"), require(row, path, "completions", (list,))
    if len(completions) < 2 or not all(isinstance(entry, dict) for entry in completions):
        reject(row, path, '"completions" is no list of at least two {"rank": number, "completion": answer}')
    entries = [Row(row.number, entry) for entry in completions]
    ranks = [require(entry, path, "rank", (int, float)) for entry in entries]
    if not all(_is_mark(rank, by_rank=False) for rank in ranks):
        reject(row, path, '"rank" is no finite number')
    responses = [require_content(entry, path, "completion", may_be_empty=True) for entry in entries]
    if isinstance(context, str) and any(isinstance(response, list) for response in responses):
        context = _as_chat(context)
    texts = tuple(_response_text(row, path, response, '"completion"') for response in responses)
    return Comparison(context, texts, dense_ranks(ranks))


def _openai(row: Row, path: str) -> Comparison:
    query = require_content(row, path, "query")
    count = sum(name.removeprefix("sample").isdecimal() for name in row.values if name.startswith("sample"))
    samples = tuple(require(row, path, f"sample{i}") for i in range(count))
    best = require(row, path, "best", (int, float))
    if count < 2 or best not in range(count):
        reject(row, path, f'"best" is {best}, which is none of sample0 to sample{count - 1}')
    return Comparison(query, samples, tuple(1 if i == best else 2 for i in range(count)))


def _pair(row: Row, path: str) -> Comparison:
    chosen, rejected = (require_content(row, path, name, may_be_empty=True) for name in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        reject(row, path, '"chosen" and "rejected" are of different kinds')
    if isinstance(chosen, str):
        prompt, responses = _text_pair(row, path, chosen, rejected)
    else:
        prompt, responses = _chat_pair(row, path, chosen, rejected)
    margin = _number(row, path, "margin")
    good, bad = _number(row, path, "score_chosen"), _number(row, path, "score_rejected")
    if good is not None and bad is not None and good < bad:
        reject(row, path, f'"score_chosen" is {good:g}, less than "score_rejected", {bad:g}')
    tied = good is not None and good == bad
    return Comparison(prompt, responses, (1, 1) if tied else (1, 2), margin or 0.0)


def _number(row: Row, path: str, column: str) -> float | None:
    """A finite number; None where the column is missing or null."""
    if row.values.get(column) is None:
        return None
    number = require(row, path, column, (int, float))
    if not math.isfinite(number):
        reject(row, path, f'"{column}" is {number}')
    return float(number)


def _text_pair(row: Row, path: str, chosen: str, rejected: Any) -> tuple[Content, tuple[str, str]]:
    if row.values.get("prompt") is not None:
        return require_content(row, path, "prompt"), (chosen, rejected)
    cut = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    while cut >= len(ASSISTANT) and rejected[:cut] != chosen[:cut]:
        cut = chosen.rfind(ASSISTANT, 0, cut - 1) + len(ASSISTANT)
    if cut < len(ASSISTANT):
        cut = _shared_words(chosen, rejected)
        if not chosen[:cut].strip():
            reject(row, path, 'no "prompt", and "chosen" and "rejected" share no beginning that could be one')
    return chosen[:cut], (chosen[cut:], rejected[cut:])


def _shared_words(one: str, other: str) -> int:
    """Number of characters of the whole words with which both begin; a space belongs to the word behind it, as in
    TRL's `extract_prompt`."""
    pairs = enumerate(zip(one, other, strict=False))
    cut = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    if not all(text[cut : cut + 1].isspace() or cut == len(text) for text in (one, other)):
        while cut and not one[cut - 1].isspace():
            cut -= 1
    return cut - 1 if cut and one[cut - 1] == " " else cut


def _chat_pair(row: Row, path: str, chosen: Messages, rejected: Any) -> tuple[Content, tuple[str, str]]:
    """Answers as messages, with the prompt before them or in its own column."""
    given = row.values.get("prompt")
    if chosen[0]["role"] == "assistant":
        given = require_content(row, path, "prompt")
        prompt = _as_chat(given) if isinstance(given, str) else given
        responses = chosen, rejected
    else:
        shared = zip(chosen[:-1], rejected[:-1], strict=False)
        prompt = [message for message, _ in takewhile(lambda both: both[0] == both[1], shared)]
        responses = chosen[len(prompt) :], rejected[len(prompt) :]
        if isinstance(given, list) and given != prompt:
            reject(row, path, '"prompt" and the messages before the answers differ')
    first, second = (_response_text(row, path, response, '"chosen" and "rejected"') for response in responses)
    return prompt, (first, second)


def _as_chat(prompt: str) -> Messages:
    return [{"role": "user", "content": prompt}]


def _response_text(row: Row, path: str, response: Content, what: str) -> str:
    """An answer given as text, or as one message of the assistant."""
    if isinstance(response, str):
        return response
    if len(response) != 1 or response[0]["role"] != "assistant":
        reject(row, path, f"{what} must be one assistant message each, after the same messages")
    further = [key for key in response[0] if key not in ("role", "content", "name")]
    if further:
        reject(row, path, f'an answer in {what} has "{further[0]}"; answers are compared as texts only')
    return str(response[0]["content"])


FORMS: dict[str, tuple[tuple[str, ...], Callable[[Row, str], Comparison]]] = {
    "rankings": (("responses",), _ranking),
    "NeMo completions": (("context", "completions"), _nemo),
    "OpenAI comparisons": (("query", "best"), _openai),
    "scored pairs": (("chosen", "rejected", "score_chosen", "score_rejected"), _pair),
    "pairs": (("prompt", "chosen", "rejected"), _pair),
    "transcripts": (("chosen", "rejected"), _pair),
}
"""Form -> the columns by which it is known, and its reader; the first that fits is meant."""
