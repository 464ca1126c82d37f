"""What is in a data file, and what is wrong with it: the figures of `keel data check`."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from keel.data.contents import Contents, Entry
from keel.data.messages import plain_text
from keel.data.notes import Notes, note_kinds, remarks
from keel.data.preferences import Ranking, prompt_key
from keel.errors import DataError

NAMED_ERRORS = 20
"""Lines that are named for each finding; all are counted."""


def check_report(contents: Contents, against: Sequence[Contents] = ()) -> dict[str, Any]:
    """All that `keel data check` says, as plain values. Lengths are in characters."""
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
            "why": [error_entry(error) for error in contents.broken[:NAMED_ERRORS]],
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
        "raters": dict(Counter(ranking.rater for ranking in rankings if ranking.rater).most_common()),
        "sources": dict(Counter(ranking.source for ranking in rankings if ranking.source).most_common()),
        "leaks": [_leaks(contents, other) for other in against],
        "remarks": _remarks(contents),
    }


def check_verdict(metrics: dict[str, Any]) -> str:
    """What is wrong with a file so that it must not be trained on as it is, in one line; empty when nothing is."""
    faults = []
    if not metrics["usable"]:
        faults.append("no row can be used")
    elif metrics["broken"]["rows"]:
        faults.append(f"{metrics['broken']['rows']:,} of {metrics['rows']:,} rows cannot be used")
    if metrics["preferences"] and not metrics["preferences"]["told_apart"]:
        faults.append("no row prefers one answer to another")
    for leak in metrics["leaks"]:
        if leak["rows"]:
            faults.append(f"prompts of {leak['file']} in {num_rows(leak['rows'])}")
        if leak["unread"]:
            faults.append(f"{num_rows(leak['unread'])} of {leak['file']} cannot be read")
    tried = metrics.get("model")
    if tried and tried["refused"]["rows"]:
        faults.append(f"{num_rows(tried['refused']['rows'])} cannot be used with this model")
    return ", ".join(faults)


def num_rows(count: int) -> str:
    """`1 row`, `1,000 rows`"""
    return f"{count:,} row{'' if count == 1 else 's'}"


def _duplicates(entries: Sequence[Entry]) -> dict[str, Any]:
    """Rows that say what an earlier one said: prompt, answers, order and rater."""
    first: set[Any] = set()
    again = []
    for entry in entries:
        ranking = entry.ranking
        ranks = ranking.ranks if ranking else (None,) * len(entry.responses)
        said = tuple(sorted(zip(entry.responses, (rank or 0 for rank in ranks), strict=True)))
        key = (prompt_key(entry.prompt or ""), said, ranking.rater if ranking else "")
        if key in first:
            again.append(entry.number)
        first.add(key)
    return _row_summary(again)


def _preferences(entries: Sequence[Entry]) -> dict[str, Any]:
    told_apart = tied = unequal = longer = not_ranked = 0
    same_answer = []
    for entry, ranking in ((entry, entry.ranking) for entry in entries if entry.ranking):
        pairs = [(ranking.responses[i], ranking.responses[j]) for i, j in ranking.pairs]
        told_apart, tied = told_apart + len(pairs), tied + len(ranking.ties)
        unequal += sum(len(better) != len(worse) for better, worse in pairs)
        longer += sum(len(better) > len(worse) for better, worse in pairs)
        not_ranked += ranking.ranks.count(None)
        if any(better == worse for better, worse in pairs):
            same_answer.append(entry.number)
    responses = sum(len(entry.responses) for entry in entries)
    return {
        "told_apart": told_apart,
        "tied_share": tied / max(1, tied + told_apart),
        "not_ranked_share": not_ranked / max(1, responses),
        "chosen_longer_share": longer / unequal if unequal else None,
        "same_answer_both_ways": _row_summary(same_answer),
        "contradictions": _contradictions(entries),
    }


def _contradictions(entries: Sequence[Entry]) -> dict[str, Any]:
    """Pairs of answers to one prompt that are ordered one way and also the other; `one_rater`: by the same person, or
    nobody knows by whom. Lines: the later row of each."""
    by_prompt: dict[str, list[tuple[int, Ranking]]] = defaultdict(list)
    for entry in entries:
        if entry.ranking is not None:
            by_prompt[prompt_key(entry.ranking.prompt)].append((entry.number, entry.ranking))
    pairs, by_one = 0, 0
    lines: set[int] = set()
    for rows in by_prompt.values():
        if len(rows) == 1 and len(set(rows[0][1].responses)) == len(rows[0][1].responses):
            continue
        found, where = _both_ways(rows)
        pairs, by_one = pairs + len(found), by_one + sum(found.values())
        lines |= where
    return {"pairs": pairs, "one_rater": by_one, **_row_summary(sorted(lines))}


def _both_ways(rows: Sequence[tuple[int, Ranking]]) -> tuple[dict[frozenset[str], bool], set[int]]:
    """Of rows with one prompt: two answers -> whether one person said both; and the lines."""
    orders: dict[tuple[str, str], set[str]] = defaultdict(set)
    found: dict[frozenset[str], bool] = {}
    lines = set()
    for number, ranking in rows:
        for i, j in ranking.pairs:
            better, worse = ranking.responses[i], ranking.responses[j]
            orders[better, worse].add(ranking.rater)
            others = orders.get((worse, better))
            if others and better != worse:
                both = frozenset((better, worse))
                found[both] = found.get(both, False) or ranking.rater in others
                lines.add(number)
    return found, lines


def _remarks(contents: Contents) -> list[str]:
    """What is odd about conversations, and rows of the less frequent kind."""
    notes = Notes()
    for entry in contents.entries:
        for remark in remarks(entry.prompt) if isinstance(entry.prompt, list) else ():
            notes.add(contents.path, entry.number, remark)
    note_kinds(contents.path, {entry.number: entry.prompt or "" for entry in contents.entries}, notes)
    return notes.lines()


def _leaks(contents: Contents, other: Contents) -> dict[str, Any]:
    """Rows whose prompt is also in the other file; case and white space do not count, nor who says it."""
    known = {_words(entry) for entry in other.entries}
    shared = [entry for entry in contents.entries if _words(entry) in known]
    unread = len(other.broken)
    prompts = len({_words(entry) for entry in shared})
    return {"file": other.path, "prompts": prompts, "unread": unread, **_row_summary(entry.number for entry in shared)}


def _words(entry: Entry) -> str:
    return " ".join((entry.responses[0] if entry.prompt is None else plain_text(entry.prompt)).split()).casefold()


def _row_summary(numbers: Iterable[int]) -> dict[str, Any]:
    lines = list(numbers)
    return {"rows": len(lines), "lines": lines[:NAMED_ERRORS]}


def error_entry(error: DataError) -> dict[str, Any]:
    return {"line": int(error.where.rpartition(":")[2]), "what": error.what}


def length_quantiles(lengths: Sequence[int]) -> dict[str, int] | None:
    """Median, 95% quantile (both the lower of two), and the longest."""
    if not lengths:
        return None
    ordered = sorted(lengths)
    return {
        "median": ordered[(len(ordered) - 1) // 2],
        "p95": ordered[(len(ordered) - 1) * 95 // 100],
        "longest": ordered[-1],
    }
