"""Encode the rows of a data file as a model reads them, for `keel data check --model`.

Tokens and marks come from the functions that training uses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from keel.data.examples import ExampleFormat, read_examples
from keel.data.items import parse_unranked_responses
from keel.data.labels import parse_label
from keel.data.notes import Notes, note_comparison
from keel.data.preferences import Ranking, parse_ranking
from keel.data.prompts import read_prompt
from keel.data.rows import Row, row_in_errors, scan_rows
from keel.data.turns import encode_ranking
from keel.errors import DataError

Encode = Callable[[Ranking, int], tuple[list[list[int]], bool]]
"""Encode the responses of a ranking for a reward model within a limit of tokens; also whether a prompt was cut."""
TOO_LONG = "more than {} tokens (max_tokens)"


@dataclass(frozen=True)
class TokenRow:
    """Token ids, and a mark for each."""

    line: int
    tokens: Sequence[int]
    marked: Sequence[bool]
    mark: str  # meaning of the mark: learned, compared or scored

    def runs(self, tokenizer: Any) -> Iterator[tuple[str, list[str]]]:
        """Yield runs of tokens with the same mark, as (mark or `read`, texts of the tokens)."""
        for marked, run in groupby(zip(self.tokens, self.marked, strict=True), key=lambda pair: pair[1]):
            yield (self.mark if marked else "read"), [str(tokenizer.decode([token])) for token, _ in run]


@dataclass
class EncodedRows:
    """Encoded rows, errors of rows that the model cannot read, and remarks."""

    rows: list[TokenRow] = field(default_factory=list)
    refused: list[DataError] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)


@dataclass(frozen=True)
class RowEncoding:
    """A file, and how to read its rows."""

    path: str
    purpose: str  # as in `keel.data.contents`
    example_format: ExampleFormat
    encode: Encode | None = None  # for a reward model; None encodes comparisons as keel dpo does


def encode_rows(encoding: RowEncoding, split: str = "train") -> EncodedRows:
    """Encode every usable row of a file. Collect the errors of rows that the model cannot read, and continue."""
    result = EncodedRows(notes=Notes(bare=encoding.example_format.prompt_format.chat is None))
    encode = {
        "texts": _encode_texts,
        "comparisons": _encode_comparison,
        "answers": _encode_comparison,
        "labels": _encode_comparison,
        "prompts": _encode_prompt,
    }[encoding.purpose]
    for row in scan_rows(encoding.path, split):
        if isinstance(row, DataError):
            continue
        try:
            with row_in_errors(row, encoding.path):
                result.rows += encode(row, encoding, result.notes)
        except DataError as error:
            result.refused.append(error)
    return result


def _encode_texts(row: Row, encoding: RowEncoding, notes: Notes) -> Iterator[TokenRow]:
    for example in read_examples(row, encoding.path, encoding.example_format, notes)[0]:
        yield TokenRow(row.number, example.tokens, example.learned, "learned")


def _encode_prompt(row: Row, encoding: RowEncoding, notes: Notes) -> Iterator[TokenRow]:
    example_format = encoding.example_format
    prompt = read_prompt(row, encoding.path, example_format.tokenizer, example_format.prompt_format, notes)
    if len(prompt.tokens) > example_format.max_tokens:
        notes.add(encoding.path, row.number, TOO_LONG.format(example_format.max_tokens))
    yield TokenRow(row.number, prompt.tokens, [False] * len(prompt.tokens), "")


def _encode_comparison(row: Row, encoding: RowEncoding, notes: Notes) -> Iterator[TokenRow]:
    example_format, limit = encoding.example_format, encoding.example_format.max_tokens
    if encoding.purpose == "comparisons":
        ranking = parse_ranking(row, encoding.path)
    elif encoding.purpose == "labels":
        labelled = parse_label(row, encoding.path)
        ranking = Ranking(labelled.prompt, (labelled.response,), (1,), tools=labelled.tools, place=labelled.place)
    else:
        responses = parse_unranked_responses(row, encoding.path)
        ranks: tuple[int | None, ...] = (None,) * len(responses.responses)
        ranking = Ranking(responses.prompt, responses.responses, ranks, place=f"{encoding.path}:{row.number}")
    prompt = example_format.prompt_format.convert(ranking.prompt, row, encoding.path, example_format.tokenizer, None)
    ranking = Ranking(prompt, ranking.responses, ranking.ranks, tools=ranking.tools, place=ranking.place)
    if encoding.encode is not None:
        rows, was_cut = encoding.encode(ranking, limit)
        token_rows = [TokenRow(row.number, ids, [False] * (len(ids) - 1) + [True], "scored") for ids in rows]
    else:
        examples, was_cut = encode_ranking(ranking, example_format.tokenizer, example_format.end_ids, limit)
        if examples is None:
            raise DataError(f"a response leaves no room for a prompt within {limit} tokens", fix="raise max_tokens")
        token_rows = [TokenRow(row.number, each.tokens, each.learned, "compared") for each in examples]
    if was_cut:
        notes.add(encoding.path, row.number, TOO_LONG.format(limit))
    if encoding.encode is None or not isinstance(prompt, str):  # a reward model reads texts with its setting `template`
        note_comparison(prompt, ranking.responses, ranking.tools, ranking.place, example_format.tokenizer, notes)
    yield from token_rows
