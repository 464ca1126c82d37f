"""Which rows are learned from, which say when to stop, and which judge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from keel.config import ComparisonSettings, SupervisedSettings
from keel.data.notes import Notes
from keel.data.preferences import Ranking, load_rankings, prompt_key, split_by_prompt
from keel.data.rows import Content
from keel.errors import ConfigError, DataError
from keel.models.prompt_reading import print_remarks, read_prompt_format

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Split(Generic[RowT]):
    """Rows by what they are for. No prompt is in two of them, unless `eval_path` says so."""

    train: list[RowT]
    watched: list[RowT]  # with patience: the loss on them says when to stop; else none
    held_out: list[RowT]  # judge the result, and nothing else
    left_out: int = 0  # rows that say nothing


def split_rows(
    rows: Sequence[RowT],
    others: Sequence[RowT] | None,
    prompt_of: Callable[[RowT], Content],
    config: SupervisedSettings,
) -> Split[RowT]:
    """Hold out a share of the prompts, unless the held-out rows come as `others`; watch a share of those that remain.

    Raises DataError when one of the sides would be empty.
    """
    data = config.data
    if others is None:
        train, held_out = split_by_prompt(rows, prompt_of, data.eval_fraction, config.seed)
    else:
        train, held_out = list(rows), list(others)
    if not config.patience:
        return Split(train, [], held_out)
    train, watched = split_by_prompt(train, prompt_of, data.watch_fraction, config.seed)
    if not watched:
        raise ConfigError("patience needs prompts to watch", where="data.watch_fraction", fix="set it above 0")
    return Split(train, watched, held_out)


def split_rankings(config: ComparisonSettings) -> Split[Ranking]:
    """The rankings of the data file that say something, best answer first, with a mean weight of 1 among those learned.

    Raises ConfigError when a margin meets a loss that has no place for it, DataError when nothing is left.
    """
    data = config.data
    notes, prompt_format = Notes(), read_prompt_format(data)

    def load(path: str) -> list[Ranking]:
        rankings = load_rankings(path, data.split, notes)
        return [replace(ranking, prompt=prompt_format.content(ranking.prompt)) for ranking in rankings]

    rankings = load(data.path)
    if getattr(config, "loss", "") in ("listwise", "ipo") and any(ranking.margin for ranking in rankings):
        raise ConfigError("a margin belongs to a pair", where=data.path, fix="set loss to pairwise or sigmoid")
    telling = [ranking.ranked for ranking in rankings if ranking.weight and is_informative(ranking, config.ties)]
    others = load(data.eval_path) if data.eval_path else None
    print_remarks(notes.lines())
    judging = None if others is None else [ranking.ranked for ranking in others]
    split = split_rows(telling, judging, lambda ranking: ranking.prompt, config)
    if not any(ranking.pairs for ranking in split.train):
        raise DataError("no row prefers one answer to another", where=data.path)
    watched, held_out = ([row for row in side if row.weight and row.pairs] for side in (split.watched, split.held_out))
    wanted = {"held-out": (held_out, data.eval_path or data.eval_fraction), "watched": (watched, config.patience)}
    for name, (rows, asked) in wanted.items():
        if asked and not rows:
            raise DataError(f"no {name} row prefers one answer to another", where=data.eval_path or data.path)
    mean = sum(ranking.weight for ranking in split.train) / len(split.train)
    return Split(
        [replace(ranking, weight=ranking.weight / mean) for ranking in split.train],
        watched,
        held_out,
        len(rankings) - len(telling),
    )


def is_informative(ranking: Ranking, ties: str) -> bool:
    return bool(ranking.pairs or (ties == "half" and ranking.ties))


def prompts_on_both_sides(split: Split[Ranking]) -> int:
    """Held-out prompts that are also learned from, or watched; only `eval_path` can bring them in."""
    seen = {prompt_key(ranking.prompt) for ranking in (*split.train, *split.watched)}
    return len(seen & {prompt_key(ranking.prompt) for ranking in split.held_out})
