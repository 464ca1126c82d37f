"""Rankings leave the store: as rows that `load_rankings` reads, or as a table for a spreadsheet."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keel.data.preferences import Ranking
from keel.data.rows import Content
from keel.data.turn_text import content_text
from keel.ranking import consensus
from keel.ranking.consensus import Consensus
from keel.ranking.judgements import Item, Judgement

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""A cell that begins so may be run as a formula by the spreadsheet that opens it."""


def export(judgements: Sequence[Judgement], form: str, aggregate: bool) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of an export, and what was counted. `form`: rankings, or pairs.

    One row for each ranking, or for each two answers that one tells apart, with the weight of its rater; `aggregate`:
    one consensus for each item in place of its raters' rankings. "Cannot judge" gives no row, an item on which the
    raters cancel each other out gives no pair.
    """
    found = consensus.fit_consensus(judgements)
    given = [judgement for judgement in judgements if judgement.ranks is not None]
    rankings = _consensus_rows(given, found) if aggregate else [_rater_row(judgement, found) for judgement in given]
    rows = rankings if form == "rankings" else [pair for row in rankings for pair in _pair_rows(row)]
    counts = {
        "rows": len(rows),
        "items": len({judgement.item.number for judgement in given}),
        "raters": len({judgement.rater for judgement in given}),
        "rankings": len(given),
        "cannot_judge": len(judgements) - len(given),
    }
    return rows, counts


def ranking_row(ranking: Ranking) -> dict[str, Any]:
    """A ranking as keel's own row, or a pair where it has a margin; without what it does not say."""
    row: dict[str, Any] = {"prompt": ranking.prompt}
    if ranking.margin and ranking.pairs:
        better, worse = (_response(ranking.prompt, response) for response in ranking.ranked.responses)
        row |= {"chosen": better, "rejected": worse, "margin": ranking.margin}
    else:
        row |= {"responses": list(ranking.responses), "ranks": list(ranking.ranks)}
    others = {"weight": (ranking.weight, 1.0), "rater": (ranking.rater, ""), "source": (ranking.source, "")}
    return row | {name: value for name, (value, usual) in others.items() if value != usual}


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One object a line, every character as it was."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same for a spreadsheet: a column for each answer and each rank, chats as `role: text` lines, and a ' before
    whatever the spreadsheet would take for a formula. It begins with a byte order mark, by which Excel knows UTF-8."""
    width = max((len(row.get("responses", ())) for row in rows), default=0)
    columns: list[str] = []
    for name in dict.fromkeys(name for row in rows for name in row):
        columns += [f"{name} {place}" for place in range(1, width + 1)] if name in ("responses", "ranks") else [name]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(_cells(row) for row in rows)
    return "\ufeff" + text.getvalue()


def _rater_row(judgement: Judgement, found: Consensus) -> dict[str, Any]:
    return {
        **_item_row(judgement.item, judgement.ranks or ()),
        "rater": judgement.rater,
        "weight": round(found.weights.get(judgement.rater, 1.0), 4),
        "source": judgement.item.source,
        "comment": judgement.comment,
        "tags": list(judgement.tags),
    }


def _consensus_rows(given: Sequence[Judgement], found: Consensus) -> list[dict[str, Any]]:
    by_item: dict[int, list[Judgement]] = defaultdict(list)
    for judgement in given:
        by_item[judgement.item.number].append(judgement)
    return [
        {
            **_item_row(own[0].item, found.ranks(own[0].item)),
            "raters": len(own),
            "source": own[0].item.source,
        }
        for _, own in sorted(by_item.items())
    ]


def _item_row(item: Item, ranks: Sequence[int | None]) -> dict[str, Any]:
    return {"prompt": item.prompt, "responses": list(item.responses), "ranks": list(ranks)}


def _pair_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every two answers that a row tells apart, in TRL's form: answers to a chat are messages."""
    others = {name: row[name] for name in ("rater", "raters", "weight", "source") if name in row}
    pairs = Ranking(row["prompt"], tuple(row["responses"]), tuple(row["ranks"])).pairs
    responses = [_response(row["prompt"], response) for response in row["responses"]]
    return [{"prompt": row["prompt"], "chosen": responses[i], "rejected": responses[j], **others} for i, j in pairs]


def _response(prompt: Content, response: str) -> Content:
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if name in ("responses", "ranks"):
            cells |= {f"{name} {place}": _cell(part) for place, part in enumerate(value, start=1)}
        elif name == "tags":
            cells[name] = _cell(", ".join(value))
        elif name in ("chosen", "rejected") and isinstance(value, list):
            cells[name] = _cell(value[0]["content"])
        else:
            cells[name] = _cell(content_text(value) if isinstance(value, list) else value)
    return cells


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
