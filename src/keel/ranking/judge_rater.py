"""A judge as a rater of a study: it ranks every item once, beside the people, and takes no item from them."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from keel.errors import DataError
from keel.judge.comparisons import Group, compare_groups, rank_groups
from keel.judge.judge import Judge, NoVerdict
from keel.ranking.judgements import Item
from keel.ranking.records import encode_json
from keel.ranking.store import Store, insert_deal, utc_now

ITEMS_AT_ONCE = 64
"""Items of one batch. The rankings of a batch are recorded together."""


def rank_with_judge(
    store: Store, judge: Judge, name: str, show: Callable[[int, int], None] = lambda done, total: None
) -> tuple[int, list[str]]:
    """Let a judge rank all items that it has not ranked.

    Returns the number of items that it ranked, and for each item without a verdict the reason.

    Items of two responses are compared in both orders. Longer ones are ranked at once.

    Args:
        name: the judge's name as a rater.
        show: called after each batch with the numbers of items done and in all.

    Raises DataError if the name belongs to a person or to another judge, RewardError if the judge cannot be asked. The
    rankings until then stay.
    """
    _register(store, judge, name)
    ranked = {judgement.item.number for judgement in store.judgements() if judgement.rater == name}
    items, reasons = [item for item in store.items() if item.number not in ranked], list[str]()
    for start in range(0, len(items), ITEMS_AT_ONCE):
        batch = items[start : start + ITEMS_AT_ONCE]
        for item, ranks in zip(batch, _ranks(judge, batch), strict=True):
            if isinstance(ranks, NoVerdict):
                reasons.append(ranks.reason)
            else:
                _record(store, name, item, ranks)
        show(start + len(batch), len(items))
    return len(items) - len(reasons), reasons


def _ranks(judge: Judge, items: Sequence[Item]) -> list[list[int] | NoVerdict]:
    groups = [Group(item.prompt, item.responses) for item in items]
    pairs = [group for group in groups if len(group.responses) == 2]
    more = [group for group in groups if len(group.responses) > 2]
    compared = iter([_pair_ranks(results[0][1]) for results in compare_groups(judge, pairs)])
    ranked = iter(rank_groups(judge, more))
    return [next(compared if len(group.responses) == 2 else ranked) for group in groups]


def _pair_ranks(result: float | NoVerdict) -> list[int] | NoVerdict:
    """Return the ranks of two responses from the result of the first."""
    if isinstance(result, NoVerdict):
        return result
    return [1 + (result < 0.5), 1 + (result > 0.5)]


def _register(store: Store, judge: Judge, name: str) -> None:
    """Add the judge to the raters, and mark it as a judge."""
    rubric = hashlib.sha256(judge.rubric.encode()).hexdigest()
    about = {"model": judge.settings.model, "rubric_sha256": rubric}
    with store.together():
        judges: dict[str, Any] = store.judges()
        if name not in judges and name in store.raters():
            raise DataError(f"the rater {name!r} is a person", "judge.name", "choose another name")
        if judges.get(name, about) != about:
            raise DataError(
                f"the judge {name!r} of this study has another model or rubric", "judge.name", "choose another name"
            )
        if name not in judges:
            store.add_raters([name])
            store.remember("judges", {**judges, name: about})


def _record(store: Store, name: str, item: Item, ranks: Sequence[int]) -> None:
    """Record a ranking, with a deal that is no longer open."""
    levels = sorted(set(ranks))
    dense = [levels.index(rank) + 1 for rank in ranks]
    with store.database.transaction("IMMEDIATE") as db:
        shown = encode_json(list(range(len(ranks))))
        deal = insert_deal(db, name, item.number, shown, is_open=False)["id"]
        db.execute(
            "INSERT INTO judgements (deal, item, rater, ranks, comment, tags, seconds, made_at)"
            " VALUES (?, ?, ?, ?, '', '[]', 0.0, ?)",
            (deal, item.number, name, encode_json(dense), utc_now()),
        )
        store.workload = None
