"""Print metrics as a table on the terminal."""

import os
from collections.abc import Mapping, Sequence
from typing import Any


def print_table(title: str, columns: Mapping[str, Mapping[str, Any]], note: str = "") -> None:
    """Print one row for each metric and one column for each entry of `columns`.

    Under torchrun only the first process prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    # Imported here: every verb imports this module, and --help must not wait for rich.
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for row in dict.fromkeys(key for metrics in columns.values() for key in metrics):
        table.add_row(row, *(number(metrics.get(row, "")) for metrics in columns.values()))
    console = Console(highlight=False)
    console.print(table)
    if note:
        console.print(note, markup=False, soft_wrap=True)


def format_interval(metrics: Mapping[str, Any], name: str) -> str:
    """Format a metric and its interval: `0.71 [0.66, 0.76]`."""
    return f"{number(metrics[name])} [{number(metrics[f'{name}_low'])}, {number(metrics[f'{name}_high'])}]"


def number(value: Any) -> str:
    """Format a float to four significant digits, and any other value with `str`."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def select_metrics(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of these names, in this order, without those that are missing."""
    return {name: metrics[name] for name in names if name in metrics}
