"""What raters did, on the terminal and as files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from keel.errors import ConfigError
from keel.files import open_regular
from keel.terminal import literal

if TYPE_CHECKING:
    from keel.ranking.judgements import Judgement

NAMED_ERRORS = 5
"""Items of most disagreement that are printed; --json has more."""


def write_export(judgements: Sequence["Judgement"], path: str, form: str, aggregate: bool) -> dict[str, int]:
    """Write what was ranked to a .jsonl or .csv file, whole or not at all; returns what was counted.

    Raises ConfigError for another kind of file, CheckpointError when it cannot be written.
    """
    from keel.ranking.export import csv_table, export, json_lines
    from keel.run.folder import write_atomic

    if not path.endswith((".jsonl", ".csv")):
        raise ConfigError(f"{path} is neither .jsonl nor .csv", where="export", fix="choose one of them")
    if not _is_ours(Path(path)):
        raise ConfigError(f"{path} exists, and is no earlier export", where="export", fix="choose another name")
    rows, counts = export(judgements, form, aggregate)
    write_atomic(Path(path), csv_table(rows) if path.endswith(".csv") else json_lines(rows))
    return counts


def _is_ours(path: Path) -> bool:
    """Whether nothing lies there, or only what an export wrote: its rows name their raters."""
    if not path.is_file() or not path.stat().st_size:
        return True
    with open_regular(path) as file:
        first = file.readline(1_000_000).decode("utf-8-sig", "replace")
    return re.search(r'"raters?"[:,]', first) is not None


def print_stats(stats: Mapping[str, Any]) -> None:
    """What `agreement.summary` returns, as tables of at most 80 columns."""
    console = Console(highlight=False, markup=False, emoji=False)
    for table in (_progress(stats), _raters(stats["raters"])):
        console.print(table)
    if stats["disagreements"]:
        console.print("Most disagreement", style="bold")
    for item in stats["disagreements"][:NAMED_ERRORS]:
        console.print(f"item {item['item']}, {_percent(item['agreement'])} the same: {_start(item['prompt'], 400)}")
        console.print(_responses(item))
    console.print("[] = 95% intervals over items. Shares are of answer pairs that were told apart.")


def _progress(stats: Mapping[str, Any]) -> Table:
    table = Table("", "", title="Ratings", title_justify="left", title_style="bold", show_header=False)
    seconds, alpha = stats["seconds"], stats["alpha"]
    time = "-"
    if seconds["median"] is not None:
        time = f"{seconds['median']:.1f} s a ranking (median), {seconds['total'] / 3600:.1f} h in all"
    rows = {
        "items": f"{stats['items']}, {stats['ranked']} of them ranked by {stats['overlap']} or more",
        "rankings": f'{stats["judgements"]}, {stats["cannot_judge"]} of them "cannot judge"',
        "time": time,
        "Krippendorff's alpha": _interval(alpha, "{:.2f}") + "  1 = agree, 0 = chance",
        "two raters agree": _interval(stats["agreement"]) + f"  {stats['agreement']['pairs']} pairs",
        "shown earlier wins": _interval(stats["position"]) + "  50% = no favour",
        "longer text wins": _interval(stats["longer"]),
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _raters(raters: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Raters", title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("", overflow="fold")
    for name in ("done", "cannot\njudge", "median\nseconds", "ties", "as the\nothers", "earlier\nwins", "longer\nwins"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("weight", justify="right", no_wrap=True)
    for rater in raters:
        seconds, weight = rater["median_seconds"], rater["weight"]
        table.add_row(
            literal(rater["name"]),
            str(rater["done"]),
            str(rater["cannot_judge"]),
            "-" if seconds is None else f"{seconds:.1f}",
            *(_percent(value) for value in (rater["ties"], rater["agreement"]["value"])),
            *(_percent(rater[name]) for name in ("position", "longer")),
            "-" if weight is None else f"{weight:.2f}",
        )
    return table


def _responses(item: Mapping[str, Any]) -> Table:
    """One row an answer, one column a rater's rank."""
    table = Table("answer", width=80)
    for ranking in item["rankings"]:
        table.add_column(_start(ranking["rater"], 8), justify="right")
    for place, response in enumerate(item["responses"]):
        ranks = [ranking["ranks"][place] for ranking in item["rankings"]]
        table.add_row(_start(response, 160), *("-" if rank is None else str(rank) for rank in ranks))
    return table


def _interval(metrics: Mapping[str, Any], form: str = "{:.0%}") -> str:
    """`71% [66%, 76%]`"""
    value, low, high = (metrics[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    return form.format(value) + (f" [{form.format(low)}, {form.format(high)}]" if low is not None else "")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _start(text: str, length: int) -> str:
    """The first characters, in one line."""
    return literal(text[:length]) + ("..." if len(text) > length else "")
