"""Write the table of docs/models.md from the results of benchmarks/architectures.py."""

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
VERBS = ("sft", "reward", "dpo", "ppo", "ppo shared", "grpo lora", "evaluate", "in bfloat16")
FLOAT32, GRADIENT = 1e-5, 1e-4


def write_table(results: Path, document: Path) -> None:
    """Write the table between the marks of the document. Raises ValueError if the marks are missing.

    Existing rows of families without a result are kept.
    """
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{document} has no {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    previous, after = rest.split(END)
    document.write_text(f"{before}{BEGIN}\n{table(rows_of(previous) | rows(results))}{END}{after}", encoding="utf-8")


def rows_of(previous: str) -> dict[str, list[str]]:
    """Return the cells of each family's row in a table."""
    lines = [line.strip("|").split("|") for line in previous.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells] for cells in lines[1:]}


def rows(results: Path) -> dict[str, list[str]]:
    """Return the cells of each family that has a result."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")}
    made = {}
    for family, result in found.items():
        kind, why = verdict(result)
        made[family] = [family, kind, result.get("reading", ""), result.get("decoding", ""), why]
    return made


def table(cells: dict[str, list[str]]) -> str:
    """Return the counts, and a row for each family."""
    kinds = [kind for _, kind, *_ in cells.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))
    head = "| family | verdict | rows are read | decoding | why |\n|---|---|---|---|---|\n"
    lines = [f"| {' | '.join(cells[family])} |\n" for family in sorted(cells)]
    return f"{len(cells)} families: {counts}.\n\n{head}{''.join(lines)}"


def verdict(result: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict (works, works slowly, refused, partly, differs, crashes, not tried) and its reason."""
    if "not made" in result or "late" in result:
        return "not tried", short(result["not made"]) if "not made" in result else result["late"]
    outcomes = {name: result[name] for name in ("compare", *VERBS) if name in result}
    if crashed := [name for name, what in outcomes.items() if what.startswith("crashes")]:
        return "crashes", f"{', '.join(crashed)}: {short(outcomes[crashed[0]])}"
    if outcomes["compare"].startswith("refused"):
        return "refused", short(outcomes["compare"])
    if differing := differences(result):
        return "differs", ", ".join(differing)
    if refused := [name for name, what in outcomes.items() if what.startswith("refused")]:
        return "partly", f"{', '.join(refused)}: {short(outcomes[refused[0]])}"
    if result["decoding"] == "again" or result["reading"] == "one by one":
        return "works slowly", "every token reads its row again"
    return "works", ""


def differences(result: dict[str, Any]) -> list[str]:
    """Describe what differs from plain transformers by more than rounding."""
    limits = {"float32": FLOAT32, "gradient": GRADIENT}
    if "bfloat16" in result:
        limits["bfloat16"] = 2 * result["bfloat16_plain"] + 1e-3
    limits |= {name: FLOAT32 for name in result if name.endswith(" gap")}
    return [f"{name} {result[name]:.1g}" for name, limit in limits.items() if not result[name] <= limit]


def short(what: str) -> str:
    return what.partition(": ")[2].replace("|", "/")[:160]
