"""Read comparisons of responses in the formats of keel and other tools. The columns identify the format.

| form | columns |
|---|---|
| rankings | `prompt, responses` and `ranks` or `scores`: keel's format |
| NeMo completions | `context, completions: [{"rank", "completion"}]`, the lowest rank is best |
| OpenAI comparisons | `query, sample0, sample1, ..., best`: the best above the rest (Ziegler et al. 2019) |
| scored pairs | `chosen, rejected, score_chosen, score_rejected`: binarised UltraFeedback; equal scores are a tie |
| pairs | `prompt, chosen, rejected`: TRL's, as texts or as messages |
| transcripts | `chosen, rejected`: dialogues that begin with the prompt, as in Anthropic's HH data or as messages |
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from keel.data.rows import Content, Messages, Row, reject, require, require_content

ASSISTANT = "\n\nAssistant:"
"""Text before each response in a transcript of Anthropic's HH data, which has no column for the prompt."""


class Comparison(NamedTuple):
    """Responses to one prompt and their order."""

    prompt: Content
    responses: tuple[str, ...]
    ranks: tuple[int | None, ...]  # 1 is best, equal ranks are a tie, None = not ranked
    margin: float = 0.0


def detect_form(row: Row) -> str | None:
    """Return the format of a row, a key of FORMS; None if it is no comparison. A column with null counts as missing."""
    return _form_of_columns(frozenset(name for name, value in row.values.items() if value is not None))


@lru_cache
def _form_of_columns(columns: frozenset[str]) -> str | None:
    return next((form for form, (marks, _) in FORMS.items() if columns.issuperset(marks)), None)


def read_comparison(row: Row, path: str) -> Comparison:
    """Read the comparison of a row in any format. Raises DataError with file and line."""
    form = detect_form(row)
    if form is None and "prompt" in row.values and not {"chosen", "rejected"} & row.values.keys():
        reject(row, path, f'needs "chosen" and "rejected", or "responses"; columns: {", ".join(row.values)}')
    _, read = FORMS[form or "transcripts"]
    return read(row, path)


def _ranking(row: Row, path: str) -> Comparison:
    prompt = require_content(row, path, "prompt")
    responses = require_responses(row, path)
    by_rank = row.values.get("ranks") is not None
    if by_rank == (row.values.get("scores") is not None):
        reject(row, path, 'give either "ranks" (1 is best) or "scores" (higher is better)')
    column = "ranks" if by_rank else "scores"
    marks = require(row, path, column, (list,))
    if len(marks) != len(responses):
        reject(row, path, f'{len(marks)} "{column}" for {len(responses)} responses')
    if not all(mark is None or _is_mark(mark, by_rank) for mark in marks):
        reject(row, path, f'every entry of "{column}" must be {"an integer from 1" if by_rank else "a number"} or null')
    if by_rank:
        return Comparison(prompt, responses, tuple(None if rank is None else int(rank) for rank in marks))
    return Comparison(prompt, responses, dense_ranks([None if score is None else -score for score in marks]))


def require_responses(row: Row, path: str) -> tuple[str, ...]:
    """Return the column `responses`: at least two texts. Raises DataError."""
    responses = require(row, path, "responses", (list,))
    if len(responses) < 2 or not all(isinstance(response, str) for response in responses):
        reject(row, path, '"responses" is not a list of at least two texts')
    return tuple(responses)


def dense_ranks(values: Sequence[float | None]) -> tuple[int | None, ...]:
    """Rank values from 1 for the lowest. Equal values share a rank; None stays None."""
    distinct = sorted({value for value in values if value is not None})
    ranks = {value: rank for rank, value in enumerate(distinct, start=1)}
    return tuple(None if value is None else ranks[value] for value in values)


def _is_mark(mark: Any, by_rank: bool) -> bool:
    if isinstance(mark, bool) or not isinstance(mark, int | float) or not math.isfinite(mark):
        return False
    return not by_rank or (mark >= 1 and mark == int(mark))


def _nemo(row: Row, path: str) -> Comparison:
    context, completions = require_content(row, path, "context"), require(row, path, "completions", (list,))
    if len(completions) < 2 or not all(isinstance(entry, dict) for entry in completions):
        reject(row, path, '"completions" is not a list of at least two {"rank": number, "completion": response}')
    entries = [Row(row.number, entry) for entry in completions]
    ranks = [require(entry, path, "rank", (int, float)) for entry in entries]
    if not all(_is_mark(rank, by_rank=False) for rank in ranks):
        reject(row, path, '"rank" is not a finite number')
    responses = [require_content(entry, path, "completion", may_be_empty=True) for entry in entries]
    if isinstance(context, str) and any(isinstance(response, list) for response in responses):
        context = _as_chat(context)
    texts = tuple(response_text(row, path, response, '"completion"') for response in responses)
    return Comparison(context, texts, dense_ranks(ranks))


def _openai(row: Row, path: str) -> Comparison:
    query = require_content(row, path, "query")
    count = sum(name.removeprefix("sample").isdecimal() for name in row.values if name.startswith("sample"))
    samples = tuple(require(row, path, f"sample{i}") for i in range(count))
    best = require(row, path, "best", (int, float))
    if count < 2 or best not in range(count):
        reject(row, path, f'"best" is {best}; give the number of one of sample0 to sample{count - 1} (two or more)')
    return Comparison(query, samples, tuple(1 if i == best else 2 for i in range(count)))


def _pair(row: Row, path: str) -> Comparison:
    chosen, rejected = (require_content(row, path, name, may_be_empty=True) for name in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        reject(row, path, '"chosen" and "rejected" are of different kinds; give both as text or both as messages')
    if isinstance(chosen, str):
        prompt, responses = _text_pair(row, path, chosen, rejected)
    else:
        prompt, responses = _chat_pair(row, path, chosen, rejected)
    margin = _number(row, path, "margin")
    chosen_score, rejected_score = _number(row, path, "score_chosen"), _number(row, path, "score_rejected")
    if chosen_score is not None and rejected_score is not None and chosen_score < rejected_score:
        reject(row, path, f'"score_chosen" is {chosen_score:g}, less than "score_rejected", {rejected_score:g}')
    tied = chosen_score is not None and chosen_score == rejected_score
    return Comparison(prompt, responses, (1, 1) if tied else (1, 2), margin or 0.0)


def _number(row: Row, path: str, column: str) -> float | None:
    """Return a finite number; None if the column is missing or null."""
    if row.values.get(column) is None:
        return None
    number = require(row, path, column, (int, float))
    if not math.isfinite(number):
        reject(row, path, f'"{column}" is {number}')
    return float(number)


def _text_pair(row: Row, path: str, chosen: str, rejected: Any) -> tuple[Content, tuple[str, str]]:
    if row.values.get("prompt") is not None:
        return require_content(row, path, "prompt"), (chosen, rejected)
    # The prompt ends at the last "Assistant:" up to which both transcripts agree. rfind gives -1 without one.
    cut = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    while cut >= len(ASSISTANT) and rejected[:cut] != chosen[:cut]:
        cut = chosen.rfind(ASSISTANT, 0, cut - 1) + len(ASSISTANT)
    if cut < len(ASSISTANT):
        cut = _shared_prefix_length(chosen, rejected)
        if not chosen[:cut].strip():
            reject(
                row, path, 'no column "prompt", and "chosen" and "rejected" share no beginning that could be the prompt'
            )
    return chosen[:cut], (chosen[cut:], rejected[cut:])


def _shared_prefix_length(one: str, other: str) -> int:
    """Return the number of characters of the complete words with which both begin.

    A space belongs to the word after it, as in TRL's `extract_prompt`.
    """
    pairs = enumerate(zip(one, other, strict=False))
    cut = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    if not all(text[cut : cut + 1].isspace() or cut == len(text) for text in (one, other)):
        while cut and not one[cut - 1].isspace():
            cut -= 1
    return cut - 1 if cut and one[cut - 1] == " " else cut


def _chat_pair(row: Row, path: str, chosen: Messages, rejected: Any) -> tuple[Content, tuple[str, str]]:
    """Read responses given as messages, with the prompt before them or in the column `prompt`."""
    if chosen[0]["role"] == "assistant":
        content = require_content(row, path, "prompt")
        prompt = _as_chat(content) if isinstance(content, str) else content
        responses = chosen, rejected
    else:
        shared = zip(chosen[:-1], rejected[:-1], strict=False)
        prompt = [message for message, _ in takewhile(lambda both: both[0] == both[1], shared)]
        responses = chosen[len(prompt) :], rejected[len(prompt) :]
        column = row.values.get("prompt")
        if isinstance(column, list) and column != prompt:
            reject(row, path, '"prompt" differs from the messages before the responses')
    first, second = (response_text(row, path, response, '"chosen" and "rejected"') for response in responses)
    return prompt, (first, second)


def _as_chat(prompt: str) -> Messages:
    return [{"role": "user", "content": prompt}]


def response_text(row: Row, path: str, response: Content, what: str) -> str:
    """Return the text of a response that is a text or one assistant message."""
    if isinstance(response, str):
        return response
    if len(response) != 1 or response[0]["role"] != "assistant":
        reject(row, path, f"{what} must be one assistant message each, after the same messages")
    further = [key for key in response[0] if key not in ("role", "content", "name")]
    if further:
        reject(row, path, f'a response in {what} has "{further[0]}"; remove it, responses are compared as text only')
    return str(response[0]["content"])


FORMS: dict[str, tuple[tuple[str, ...], Callable[[Row, str], Comparison]]] = {
    "rankings": (("responses",), _ranking),
    "NeMo completions": (("context", "completions"), _nemo),
    "OpenAI comparisons": (("query", "best"), _openai),
    "scored pairs": (("chosen", "rejected", "score_chosen", "score_rejected"), _pair),
    "pairs": (("prompt", "chosen", "rejected"), _pair),
    "transcripts": (("chosen", "rejected"), _pair),
}
"""Format -> columns that identify it, and its reader. The first match counts, so the order matters."""
