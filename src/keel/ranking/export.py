"""Export of rankings: as rows that `load_rankings` reads, or as a table for a spreadsheet."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from keel.data.preferences import Ranking
from keel.data.rows import Content
from keel.data.turn_text import content_text
from keel.ranking import consensus
from keel.ranking.consensus import Consensus
from keel.ranking.judgements import Item, Judgement

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""A spreadsheet may run a cell that begins with one of these as a formula."""


def export(
    judgements: Sequence[Judgement],
    form: str,
    aggregate: bool,
    judges: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Convert judgements to rows of an export.

    "Cannot judge" gives no row. An item on which the raters cancel each other out gives no pair.

    Args:
        judgements: The judgements of a store.
        form: `rankings` for one row per ranking, `pairs` for one row per pair of responses that are not tied.
        aggregate: Whether to replace the rankings of an item by their consensus. Otherwise each row has the weight of
            its rater.
        judges: Name of each judge -> a mapping with its `agreement` with the people, or None. Its rows are marked.

    Returns:
        The rows, and counts of rows, items, raters, rankings and "cannot judge".
    """
    fitted = consensus.fit_consensus(judgements)
    ranked = [judgement for judgement in judgements if judgement.ranks is not None]
    by_rater = partial(_rater_row, fitted=fitted, judges=judges or {})
    rankings = _consensus_rows(ranked, fitted) if aggregate else [by_rater(judgement) for judgement in ranked]
    rows = rankings if form == "rankings" else [pair for row in rankings for pair in _pair_rows(row)]
    counts = {
        "rows": len(rows),
        "items": len({judgement.item.number for judgement in ranked}),
        "raters": len({judgement.rater for judgement in ranked}),
        "rankings": len(ranked),
        "cannot_judge": len(judgements) - len(ranked),
    }
    return rows, counts


def ranking_row(ranking: Ranking) -> dict[str, Any]:
    """Convert a ranking to a row of `responses, ranks`, or to a pair if it has a margin. Defaults are left out."""
    row: dict[str, Any] = {"prompt": ranking.prompt}
    if ranking.margin and ranking.pairs:
        better, worse = (_response(ranking.prompt, response) for response in ranking.ranked.responses)
        row |= {"chosen": better, "rejected": worse, "margin": ranking.margin}
    else:
        row |= {"responses": list(ranking.responses), "ranks": list(ranking.ranks)}
    others = {"weight": (ranking.weight, 1.0), "rater": (ranking.rater, ""), "source": (ranking.source, "")}
    return row | {name: value for name, (value, default) in others.items() if value != default}


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Format rows as JSON lines. Characters outside ASCII are not escaped."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as CSV for a spreadsheet.

    Each response and each rank has a column. Chats are `role: text` lines. Text that a spreadsheet would run as a
    formula is prefixed with an apostrophe. The text begins with a byte order mark, from which Excel recognises UTF-8.
    """
    width = max((len(row.get("responses", ())) for row in rows), default=0)
    columns: list[str] = []
    for name in dict.fromkeys(name for row in rows for name in row):
        columns += [f"{name} {place}" for place in range(1, width + 1)] if name in ("responses", "ranks") else [name]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(_cells(row) for row in rows)
    return "\ufeff" + text.getvalue()


def _rater_row(judgement: Judgement, fitted: Consensus, judges: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    about = judges.get(judgement.rater)
    mark = {} if about is None else {"judge": True, "agreement": about["agreement"]}
    return {
        **_item_row(judgement.item, judgement.ranks or ()),
        "rater": judgement.rater,
        "weight": round(fitted.weights.get(judgement.rater, 1.0), 4),
        "source": judgement.item.source,
        "comment": judgement.comment,
        "tags": list(judgement.tags),
        **mark,
    }


def _consensus_rows(judgements: Sequence[Judgement], fitted: Consensus) -> list[dict[str, Any]]:
    by_item: dict[int, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        by_item[judgement.item.number].append(judgement)
    return [
        {
            **_item_row(of_item[0].item, fitted.ranks(of_item[0].item)),
            "raters": len(of_item),
            "source": of_item[0].item.source,
        }
        for _, of_item in sorted(by_item.items())
    ]


def _item_row(item: Item, ranks: Sequence[int | None]) -> dict[str, Any]:
    return {"prompt": item.prompt, "responses": list(item.responses), "ranks": list(ranks)}


def _pair_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per pair of responses that are not tied, in TRL's form: a response to a chat is a message list."""
    kept = ("rater", "raters", "weight", "source", "judge", "agreement")
    others = {name: row[name] for name in kept if name in row}
    pairs = Ranking(row["prompt"], tuple(row["responses"]), tuple(row["ranks"])).pairs
    responses = [_response(row["prompt"], response) for response in row["responses"]]
    return [{"prompt": row["prompt"], "chosen": responses[i], "rejected": responses[j], **others} for i, j in pairs]


def _response(prompt: Content, response: str) -> Content:
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if name in ("responses", "ranks"):
            cells |= {f"{name} {place}": _cell(each) for place, each in enumerate(value, start=1)}
        elif name == "tags":
            cells[name] = _cell(", ".join(value))
        elif name in ("chosen", "rejected") and isinstance(value, list):
            cells[name] = _cell(value[0]["content"])
        else:
            cells[name] = _cell(content_text(value) if isinstance(value, list) else value)
    return cells


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value
