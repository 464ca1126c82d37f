"""Print the statistics of raters, and write their rankings to a file."""

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

SHOWN_DISAGREEMENTS = 5
"""number of items with the most disagreement that are printed; --json has more"""


def write_export(
    judgements: Sequence["Judgement"],
    path: str,
    form: str,
    aggregate: bool,
    judges: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, int]:
    """Write the judgements to a .jsonl or .csv file atomically, and return the counts.

    Raises ConfigError for another ending or a file that is not an export, CheckpointError if it cannot be written.
    """
    from keel.ranking.export import csv_table, export, json_lines
    from keel.run.folder import write_atomic

    if not path.endswith((".jsonl", ".csv")):
        raise ConfigError(f"{path} ends neither in .jsonl nor in .csv", where="export", fix="choose one of them")
    if not _may_replace(Path(path)):
        raise ConfigError(
            f"{path} exists, and is not an earlier export", where="export", fix="choose another file name"
        )
    rows, counts = export(judgements, form, aggregate, judges)
    write_atomic(Path(path), csv_table(rows) if path.endswith(".csv") else json_lines(rows))
    return counts


def _may_replace(path: Path) -> bool:
    """Return whether `path` is missing, empty or an earlier export. The rows of an export name their raters."""
    if not path.is_file() or not path.stat().st_size:
        return True
    with open_regular(path) as file:
        # A limit, because a file that is not an export may be a single long line.
        first_line = file.readline(1_000_000).decode("utf-8-sig", "replace")
    return re.search(r'"raters?"[:,]', first_line) is not None


def print_stats(stats: Mapping[str, Any]) -> None:
    """Print the result of `keel.ranking.agreement.summary` as tables of at most 80 columns."""
    console = Console(highlight=False, markup=False, emoji=False)
    tables = [_progress(stats), _raters(stats["raters"]), *([_judges(stats["judges"])] if stats["judges"] else [])]
    for table in tables:
        console.print(table)
    if stats["disagreements"]:
        console.print("Most disagreement", style="bold")
    for item in stats["disagreements"][:SHOWN_DISAGREEMENTS]:
        console.print(f"item {item['item']}, {_percent(item['agreement'])} agreement: {_start(item['prompt'], 400)}")
        console.print(_responses(item))
    console.print("[] = 95% intervals over items. Shares are of response pairs with a preference.")


def _progress(stats: Mapping[str, Any]) -> Table:
    table = Table("", "", title="Ratings", title_justify="left", title_style="bold", show_header=False)
    seconds, alpha = stats["seconds"], stats["alpha"]
    time = "-"
    if seconds["median"] is not None:
        time = f"{seconds['median']:.1f} s a ranking (median), {seconds['total'] / 3600:.1f} h in total"
    rows = {
        "items": f"{stats['items']}, {stats['ranked']} of them ranked by {stats['overlap']} or more",
        "rankings": f'{stats["judgements"]}, {stats["cannot_judge"]} of them "cannot judge"',
        "time": time,
        "Krippendorff's alpha": _interval(alpha, "{:.2f}") + "  1 = agree, 0 = chance",
        "two raters agree": _interval(stats["agreement"]) + f"  {stats['agreement']['pairs']} pairs",
        "shown earlier wins": _interval(stats["position"]) + "  50% = no bias",
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


def _judges(judges: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Judges, compared with people", title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("", overflow="fold")
    table.add_column("model", overflow="fold")
    for name in ("done", "ties", "as people", "longer\nwins", "weight"):
        table.add_column(name, justify="right", no_wrap=True)
    for judge in judges:
        table.add_row(
            literal(judge["name"]),
            literal(judge["model"]),
            str(judge["done"]),
            _percent(judge["ties"]),
            _interval(judge["agreement"]),
            _percent(judge["longer"]),
            "-" if judge["weight"] is None else f"{judge['weight']:.2f}",
        )
    return table


def _responses(item: Mapping[str, Any]) -> Table:
    """Return a table with a row for each response and a column for the ranks of each rater."""
    table = Table("response", width=80)
    for ranking in item["rankings"]:
        table.add_column(_start(ranking["rater"], 8), justify="right")
    for index, response in enumerate(item["responses"]):
        ranks = [ranking["ranks"][index] for ranking in item["rankings"]]
        table.add_row(_start(response, 160), *("-" if rank is None else str(rank) for rank in ranks))
    return table


def _interval(metrics: Mapping[str, Any], form: str = "{:.0%}") -> str:
    """Format a value and its interval: `71% [66%, 76%]`."""
    value, low, high = (metrics[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    return form.format(value) + (f" [{form.format(low)}, {form.format(high)}]" if low is not None else "")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _start(text: str, length: int) -> str:
    """Return the first `length` characters, with control characters escaped."""
    return literal(text[:length]) + ("..." if len(text) > length else "")
