"""Compute the metrics of `keel data check`: the contents and the faults of a data file."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from keel.data.contents import Contents, Entry
from keel.data.messages import plain_text
from keel.data.notes import Notes, note_mixed_kinds, remarks
from keel.data.preferences import Ranking, prompt_key
from keel.errors import DataError

LISTED_ERRORS = 20
"""Lines to list for each finding; all are counted."""


def check_report(contents: Contents, against: Sequence[Contents] = ()) -> dict[str, Any]:
    """Compute the metrics of a file, as plain values for JSON. Lengths are in characters."""
    entries, rankings = contents.entries, contents.rankings
    responses = [response for entry in entries for response in entry.responses]
    prompts = [entry.prompt for entry in entries if entry.prompt is not None]
    return {
        "file": contents.path,
        "purpose": contents.purpose,
        "forms": dict(Counter(entry.form for entry in entries)),
        "rows": len(entries) + len(contents.broken),
        "usable": len(entries),
        "broken": {
            "rows": len(contents.broken),
            "why": [error_entry(error) for error in contents.broken[:LISTED_ERRORS]],
        },
        "prompts": {
            "distinct": len({prompt_key(prompt) for prompt in prompts}),
            "kinds": dict(Counter("text" if isinstance(prompt, str) else "chat" for prompt in prompts)),
            "characters": length_quantiles([len(plain_text(prompt)) for prompt in prompts]),
        },
        "answers": {
            "per_row": dict(sorted(Counter(len(entry.responses) for entry in entries).items())),
            "characters": length_quantiles([len(response) for response in responses]),
            "empty": _row_summary(
                entry.number for entry in entries if not all(response.strip() for response in entry.responses)
            ),
        },
        "duplicates": _duplicates(entries),
        "preferences": _preferences(entries) if rankings else None,
        "labels": _labels(entries) if contents.purpose == "labels" else None,
        "raters": dict(Counter(ranking.rater for ranking in rankings if ranking.rater).most_common()),
        "sources": dict(Counter(ranking.source for ranking in rankings if ranking.source).most_common()),
        "leaks": [_leaks(contents, other) for other in against],
        "remarks": _remarks(contents),
    }


def check_verdict(metrics: dict[str, Any]) -> str:
    """Return the faults that exclude a file from training, in one line; empty if there are none."""
    faults = []
    if not metrics["usable"]:
        faults.append("no row can be used")
    elif metrics["broken"]["rows"]:
        faults.append(f"{metrics['broken']['rows']:,} of {metrics['rows']:,} rows cannot be used")
    if metrics["preferences"] and not metrics["preferences"]["told_apart"]:
        faults.append("no row prefers one response to another")
    for leak in metrics["leaks"]:
        if leak["rows"]:
            faults.append(f"{num_rows(leak['rows'])} with prompts of {leak['file']}")
        if leak["unread"]:
            faults.append(f"{num_rows(leak['unread'])} of {leak['file']} cannot be read")
    model_check = metrics.get("model")
    if model_check and model_check["refused"]["rows"]:
        faults.append(f"{num_rows(model_check['refused']['rows'])} cannot be used with this model")
    return ", ".join(faults)


def num_rows(count: int) -> str:
    """Return a count with its noun: `1 row`, `1,000 rows`."""
    return f"{count:,} row{'' if count == 1 else 's'}"


def _duplicates(entries: Sequence[Entry]) -> dict[str, Any]:
    """Find rows that repeat an earlier row: the same prompt, responses, order and rater, or label."""
    seen: set[Any] = set()
    repeated = []
    for entry in entries:
        ranking = entry.ranking
        ranks = ranking.ranks if ranking else (None,) * len(entry.responses)
        ranked_responses = tuple(sorted(zip(entry.responses, (rank or 0 for rank in ranks), strict=True)))
        key = (prompt_key(entry.prompt or ""), ranked_responses, ranking.rater if ranking else "", entry.label)
        if key in seen:
            repeated.append(entry.number)
        seen.add(key)
    return _row_summary(repeated)


def _labels(entries: Sequence[Entry]) -> dict[str, Any]:
    """Count the labels, and the responses to one prompt that have both of them."""
    seen: dict[tuple[str, str], bool | None] = {}
    contradicted = [
        entry.number
        for entry in entries
        if seen.setdefault((prompt_key(entry.prompt or ""), entry.responses[0]), entry.label) is not entry.label
    ]
    desirable = sum(bool(entry.label) for entry in entries)
    return {
        "desirable": desirable,
        "undesirable": len(entries) - desirable,
        "contradictions": _row_summary(contradicted),
    }


def _preferences(entries: Sequence[Entry]) -> dict[str, Any]:
    num_pairs = tied = unequal = longer = not_ranked = 0
    same_response = []
    for entry, ranking in ((entry, entry.ranking) for entry in entries if entry.ranking):
        pairs = [(ranking.responses[i], ranking.responses[j]) for i, j in ranking.pairs]
        num_pairs, tied = num_pairs + len(pairs), tied + len(ranking.ties)
        unequal += sum(len(better) != len(worse) for better, worse in pairs)
        longer += sum(len(better) > len(worse) for better, worse in pairs)
        not_ranked += ranking.ranks.count(None)
        if any(better == worse for better, worse in pairs):
            same_response.append(entry.number)
    responses = sum(len(entry.responses) for entry in entries)
    return {
        "told_apart": num_pairs,
        "tied_share": tied / max(1, tied + num_pairs),
        "not_ranked_share": not_ranked / max(1, responses),
        "chosen_longer_share": longer / unequal if unequal else None,
        "same_answer_both_ways": _row_summary(same_response),
        "contradictions": _contradictions(entries),
    }


def _contradictions(entries: Sequence[Entry]) -> dict[str, Any]:
    """Count pairs of responses to one prompt that are ordered both ways.

    `one_rater` counts those that one rater ordered both ways (rows without a rater count as one rater). `lines` has the
    later row of each pair.
    """
    by_prompt: dict[str, list[tuple[int, Ranking]]] = defaultdict(list)
    for entry in entries:
        if entry.ranking is not None:
            by_prompt[prompt_key(entry.ranking.prompt)].append((entry.number, entry.ranking))
    pairs, by_one_rater = 0, 0
    lines: set[int] = set()
    for rows in by_prompt.values():
        if len(rows) == 1 and len(set(rows[0][1].responses)) == len(rows[0][1].responses):
            continue  # a single ranking contradicts itself only if it lists a response twice
        contradictions, later_lines = _pairs_ordered_both_ways(rows)
        pairs, by_one_rater = pairs + len(contradictions), by_one_rater + sum(contradictions.values())
        lines |= later_lines
    return {"pairs": pairs, "one_rater": by_one_rater, **_row_summary(sorted(lines))}


def _pairs_ordered_both_ways(rows: Sequence[tuple[int, Ranking]]) -> tuple[dict[frozenset[str], bool], set[int]]:
    """Return, for rows with one prompt, the pairs that are ordered both ways, and the later lines.

    A pair maps to whether one rater gave both orders.
    """
    orders: dict[tuple[str, str], set[str]] = defaultdict(set)  # (better, worse) -> raters
    contradictions: dict[frozenset[str], bool] = {}
    lines = set()
    for number, ranking in rows:
        for i, j in ranking.pairs:
            better, worse = ranking.responses[i], ranking.responses[j]
            orders[better, worse].add(ranking.rater)
            opposing_raters = orders.get((worse, better))
            if opposing_raters and better != worse:
                pair = frozenset((better, worse))
                contradictions[pair] = contradictions.get(pair, False) or ranking.rater in opposing_raters
                lines.add(number)
    return contradictions, lines


def _remarks(contents: Contents) -> list[str]:
    """Return remarks on odd conversations, and on rows of the less frequent kind (text or chat)."""
    notes = Notes()
    for entry in contents.entries:
        for remark in remarks(entry.prompt) if isinstance(entry.prompt, list) else ():
            notes.add(contents.path, entry.number, remark)
    note_mixed_kinds(contents.path, {entry.number: entry.prompt or "" for entry in contents.entries}, notes)
    return notes.lines()


def _leaks(contents: Contents, other: Contents) -> dict[str, Any]:
    """Find rows whose prompt is also in the other file; case, white space and roles make no difference."""
    other_prompts = {_normalized_prompt(entry) for entry in other.entries}
    shared = [entry for entry in contents.entries if _normalized_prompt(entry) in other_prompts]
    unread = len(other.broken)
    prompts = len({_normalized_prompt(entry) for entry in shared})
    return {"file": other.path, "prompts": prompts, "unread": unread, **_row_summary(entry.number for entry in shared)}


def _normalized_prompt(entry: Entry) -> str:
    return " ".join((entry.responses[0] if entry.prompt is None else plain_text(entry.prompt)).split()).casefold()


def _row_summary(numbers: Iterable[int]) -> dict[str, Any]:
    lines = list(numbers)
    return {"rows": len(lines), "lines": lines[:LISTED_ERRORS]}


def error_entry(error: DataError) -> dict[str, Any]:
    return {"line": int(error.where.rpartition(":")[2]), "what": error.what}


def length_quantiles(lengths: Sequence[int]) -> dict[str, int] | None:
    """Return median, 95% quantile (each the lower of two values) and maximum; None without lengths."""
    if not lengths:
        return None
    ordered = sorted(lengths)
    return {
        "median": ordered[(len(ordered) - 1) // 2],
        "p95": ordered[(len(ordered) - 1) * 95 // 100],
        "longest": ordered[-1],
    }
