"""Figures as a table on the terminal."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(title: str, columns: Mapping[str, Mapping[str, Any]], note: str = "") -> None:
    """One row for each figure, one column for each of `columns`. Under torchrun only the first process prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for row in dict.fromkeys(key for figures in columns.values() for key in figures):
        table.add_row(row, *(number(figures.get(row, "")) for figures in columns.values()))
    console = Console(highlight=False)
    console.print(table)
    if note:
        console.print(note, markup=False, soft_wrap=True)


def interval(figures: Mapping[str, Any], name: str) -> str:
    """`0.71 [0.66, 0.76]`"""
    return f"{number(figures[name])} [{number(figures[f'{name}_low'])}, {number(figures[f'{name}_high'])}]"


def number(value: Any) -> str:
    """Four significant digits; whole numbers and text as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def chosen(figures: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Some of the figures, in this order."""
    return {name: figures[name] for name in names if name in figures}
