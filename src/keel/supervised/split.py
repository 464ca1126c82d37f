"""Split rows into training, watched and held-out rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from keel.config import ComparisonSettings, DpoConfig, SupervisedSettings
from keel.data.notes import Notes
from keel.data.preferences import Ranking, load_rankings, prompt_key, split_by_prompt
from keel.data.rows import Content
from keel.errors import ConfigError, DataError
from keel.models.prompt_reading import print_remarks, read_prompt_format

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Split(Generic[RowT]):
    """Rows by purpose. Two of the lists have no prompt in common, unless `eval_path` repeats one."""

    train: list[RowT]
    watched: list[RowT]  # for early stopping with `patience`; otherwise empty
    held_out: list[RowT]  # for evaluation alone
    left_out: int = 0  # rows with nothing to learn


def split_rows(
    rows: Sequence[RowT],
    others: Sequence[RowT] | None,
    prompt_of: Callable[[RowT], Content],
    config: SupervisedSettings,
) -> Split[RowT]:
    """Hold out a share of the prompts and, with `patience`, watch a share of the remaining ones.

    Args:
        others: the held-out rows, if they come from another file; then none of `rows` is held out.
        prompt_of: return the prompt of a row.

    Raises DataError when one of the lists would be empty, ConfigError when `patience` has no prompts to watch.
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
    """Load and split the rankings that have a preference, best response first.

    The weights are scaled to a mean of 1 over the training rankings. Raises ConfigError for margins with a loss that
    does not use them, DataError when no ranking is left.
    """
    data = config.data
    notes, prompt_format = Notes(), read_prompt_format(data)

    def load(path: str) -> list[Ranking]:
        rankings = load_rankings(path, data.split, notes)
        return [replace(ranking, prompt=prompt_format.convert_content(ranking.prompt)) for ranking in rankings]

    rankings = load(data.path)
    if getattr(config, "loss", "") in ("listwise", "ipo", "orpo") and any(ranking.margin for ranking in rankings):
        fix = "set loss to sigmoid or simpo" if isinstance(config, DpoConfig) else "set loss to pairwise"
        raise ConfigError("margins are used by a pairwise loss alone", where=data.path, fix=fix)
    informative = [ranking.ranked for ranking in rankings if ranking.weight and is_informative(ranking, config.ties)]
    others = load(data.eval_path) if data.eval_path else None
    print_remarks(notes.lines())
    eval_rankings = None if others is None else [ranking.ranked for ranking in others]
    split = split_rows(informative, eval_rankings, lambda ranking: ranking.prompt, config)
    if not any(ranking.pairs for ranking in split.train):
        raise DataError("no row prefers one response to another", where=data.path)
    watched, held_out = ([row for row in side if row.weight and row.pairs] for side in (split.watched, split.held_out))
    required = {"held-out": (held_out, data.eval_path or data.eval_fraction), "watched": (watched, config.patience)}
    for name, (rows, is_set) in required.items():
        if is_set and not rows:
            raise DataError(f"no {name} row prefers one response to another", where=data.eval_path or data.path)
    mean = sum(ranking.weight for ranking in split.train) / len(split.train)
    return Split(
        [replace(ranking, weight=ranking.weight / mean) for ranking in split.train],
        watched,
        held_out,
        len(rankings) - len(informative),
    )


def is_informative(ranking: Ranking, ties: str) -> bool:
    return bool(ranking.pairs or (ties == "half" and ranking.ties))


def prompts_on_both_sides(split: Split[Any]) -> int:
    """Count held-out prompts that are also training or watched prompts, which only `eval_path` can cause."""
    seen = {prompt_key(ranking.prompt) for ranking in (*split.train, *split.watched)}
    return len(seen & {prompt_key(ranking.prompt) for ranking in split.held_out})
