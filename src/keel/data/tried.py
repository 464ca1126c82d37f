"""The rows of a data file as one model reads them: what `keel data check --model` says and shows.

The tokens and marks are those of training: the same functions make them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from keel.data.examples import Imitation, read_examples
from keel.data.items import parse_unranked_responses
from keel.data.notes import Notes, note_comparison
from keel.data.preferences import Ranking, parse_ranking
from keel.data.prompts import read_prompt
from keel.data.rows import Row, naming, scan_rows
from keel.data.turns import encode_ranking
from keel.errors import DataError

Encode = Callable[[Ranking, int], tuple[list[list[int]], bool]]
"""How a reward model reads the answers of a ranking within a limit, and whether their prompt was cut."""
TOO_LONG = "more than {} tokens (max_tokens)"


@dataclass(frozen=True)
class TokenRow:
    """Token ids, and for each whether it is marked."""

    line: int
    tokens: Sequence[int]
    marked: Sequence[bool]
    mark: str  # what the mark means: learned, compared or scored

    def runs(self, tokenizer: Any) -> Iterator[tuple[str, list[str]]]:
        """Neighbouring tokens with the same mark, as (mark or `read`, their texts)."""
        for marked, run in groupby(zip(self.tokens, self.marked, strict=True), key=lambda pair: pair[1]):
            yield (self.mark if marked else "read"), [str(tokenizer.decode([token])) for token, _ in run]


@dataclass
class Tried:
    """What came of it."""

    rows: list[TokenRow] = field(default_factory=list)
    refused: list[DataError] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)


@dataclass(frozen=True)
class Trial:
    """A file and how its rows are read."""

    path: str
    purpose: str  # as in `keel.data.contents`
    imitation: Imitation
    encode: Encode | None = None  # of a reward model; None reads comparisons as a policy does


def try_rows(trial: Trial, split: str = "train") -> Tried:
    """Every sound row of a file. A row that this model cannot be given is refused, whatever the others are."""
    tried = Tried(notes=Notes(bare=trial.imitation.prompt_format.chat is None))
    read = {"texts": _texts, "comparisons": _comparison, "answers": _comparison, "prompts": _prompt}[trial.purpose]
    for row in scan_rows(trial.path, split):
        if isinstance(row, DataError):
            continue
        try:
            with naming(row, trial.path):
                tried.rows += read(row, trial, tried.notes)
        except DataError as error:
            tried.refused.append(error)
    return tried


def _texts(row: Row, trial: Trial, notes: Notes) -> Iterator[TokenRow]:
    for example in read_examples(row, trial.path, trial.imitation, notes)[0]:
        yield TokenRow(row.number, example.tokens, example.learned, "learned")


def _prompt(row: Row, trial: Trial, notes: Notes) -> Iterator[TokenRow]:
    imitation = trial.imitation
    prompt = read_prompt(row, trial.path, imitation.tokenizer, imitation.prompt_format, notes)
    if len(prompt.tokens) > imitation.max_tokens:
        notes.add(trial.path, row.number, TOO_LONG.format(imitation.max_tokens))
    yield TokenRow(row.number, prompt.tokens, [False] * len(prompt.tokens), "")


def _comparison(row: Row, trial: Trial, notes: Notes) -> Iterator[TokenRow]:
    imitation, limit = trial.imitation, trial.imitation.max_tokens
    if trial.purpose == "comparisons":
        ranking = parse_ranking(row, trial.path)
    else:
        responses = parse_unranked_responses(row, trial.path)
        ranks: tuple[int | None, ...] = (None,) * len(responses.responses)
        ranking = Ranking(responses.prompt, responses.responses, ranks, place=f"{trial.path}:{row.number}")
    prompt = imitation.prompt_format.convert(ranking.prompt, row, trial.path, imitation.tokenizer, None)
    ranking = Ranking(prompt, ranking.responses, ranking.ranks, tools=ranking.tools, place=ranking.place)
    if trial.encode is not None:
        rows, was_cut = trial.encode(ranking, limit)
        found = [TokenRow(row.number, ids, [False] * (len(ids) - 1) + [True], "scored") for ids in rows]
    else:
        examples, was_cut = encode_ranking(ranking, imitation.tokenizer, imitation.end_ids, limit)
        if examples is None:
            raise DataError(f"an answer leaves no room for a prompt within {limit} tokens", fix="raise max_tokens")
        found = [TokenRow(row.number, each.tokens, each.learned, "compared") for each in examples]
    if was_cut:
        notes.add(trial.path, row.number, TOO_LONG.format(limit))
    if trial.encode is None or not isinstance(prompt, str):  # a reward model has a template of its own for texts
        note_comparison(prompt, ranking.responses, ranking.tools, ranking.place, imitation.tokenizer, notes)
    yield from found
