"""Print the metrics of `keel evaluate` on the terminal."""

import math
from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from keel.cli.tables import format_interval, number, print_table
from keel.terminal import literal

COMPARED = ("win_rate", "length_controlled_win_rate", "score_difference", "ties")
"""metrics of a comparison, in the order of the table"""
MAX_COLUMNS = 3  # policies; more become one row each, which fits 100 characters
FEW_PROMPTS = 20
ENDS = ("_low", "_high")
SHOWN_N = {n for i in range(12) for n in (2**i, 3 * 2**i)}
"""values of n that a best-of-n table shows, besides the largest"""


def print_evaluation(metrics: Mapping[str, Any]) -> None:
    """Print the table of all prompts, then the optional parts, and the verdict of the gate at the end."""
    if "prompts" in metrics:
        print_prompts(metrics)
    if "tasks" in metrics:
        print_tasks(metrics["tasks"])
    if "gate" in metrics:
        print_gate(metrics["gate"])


def print_prompts(metrics: Mapping[str, Any]) -> None:
    """Print all that was measured on the prompts."""
    policies = policy_rows(metrics)
    print_sides(metrics, policies | ({"against": metrics["against"]} if "against" in metrics else {}))
    print("with 95% intervals over prompts; ± is half their width")
    if any("win_rate" in policy for policy in policies.values()):
        judge = literal(metrics.get("judge", "the score"))
        print(f"win rate and score difference: each policy over `against`, by {judge}; a tie is half a win")
    for side, policy in policies.items():
        print_missing_lc_win_rate("" if len(policies) == 1 else f" of {literal(side)}", policy)
    for side in list(policies)[-1:] if "frontier" in metrics else policies:
        print_slices(metrics.get("slices", {}), side, alone=len(policies) == 1)
    for side, curve in metrics.get("best_of", {}).items():
        print_best_of_curve(side, curve, metrics)
    optional = {"frontier": print_frontier, "people": print_people, "pairs": print_pairs}
    for name, print_section in optional.items():
        if name in metrics:
            print_section(metrics[name])


def print_tasks(tasks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print a column for each policy, and a row for each metric of each task."""
    columns = {
        side: {
            f"{escape_text(task)} {escape_text(name)}": cell(metrics, name)
            for task, metrics in results.items()
            for name in metrics
            if not name.endswith(ENDS)
        }
        for side, results in tasks.items()
    }
    print_table("tasks of lm-evaluation-harness, with 95% intervals over questions", columns)


def print_sides(metrics: Mapping[str, Any], sides: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a column for each policy. With many policies, print a row for each, with its main metrics."""
    rows = f" in {metrics['rows']} rows" if "rows" in metrics else ""
    title = f"{metrics['prompts']} prompts{rows}, {metrics['responses_per_prompt']} responses to each"
    if len(sides) <= MAX_COLUMNS:
        print_table(title, {side: column(policy) for side, policy in sides.items()})
        return
    names = main_metrics(sides)
    print_table(
        title, {heading(name): {side: narrow(policy, name) for side, policy in sides.items()} for name in names}
    )


def main_metrics(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the metrics for the columns of a table with a row for each policy, without those that no row has."""
    scorers = scorer_metrics(next(iter(rows.values())))
    truncated = ["truncated"] if any(row["truncated"] for row in rows.values()) else []
    rates = [name for name in next(iter(rows.values())) if "@" in name and not name.endswith(ENDS)]
    names = [*COMPARED[:2], *rates, *scorers, "kl", "length", *truncated]
    return [name for name in names if any(name in row for row in rows.values())]


def policy_rows(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return name -> metrics of each policy, including those of its comparison."""
    compared = {name: value for name, value in metrics.items() if name.startswith((*COMPARED, "length_overlap"))}
    return metrics.get("policies") or {"policy": metrics["policy"] | compared}


def column(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of one policy, with those of the comparison first."""
    names = [name for name in metrics if f"{name}_low" in metrics]
    ordered = [name for name in COMPARED if name in names] + [name for name in names if name not in COMPARED]
    return {metric_title(name): cell(metrics, name) for name in ordered}


def metric_title(name: str) -> str:
    """Return the title of a metric. Length-controlled is LC, as on the leaderboard of AlpacaEval."""
    return name.replace("length_controlled", "LC").replace("_", " ") if name in COMPARED else name


def cell(metrics: Mapping[str, Any], name: str) -> str:
    """Format a metric as `0.71 [0.66, 0.76]`. Returns an empty text if it was not measured."""
    if not is_measured(metrics, name):
        return ""
    return format_interval(round_floats(metrics), name) if f"{name}_low" in metrics else number(metrics[name])


def is_measured(metrics: Mapping[str, Any], name: str) -> bool:
    return math.isfinite(metrics.get(name, math.nan))


def round_floats(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Round floats to three significant digits. The intervals are too wide for more to mean anything."""
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in metrics.items()}


def narrow(metrics: Mapping[str, Any], name: str) -> str:
    """Format a metric as `0.71 ±0.05`, with half the width of its interval, for tables with many columns."""
    if not is_measured(metrics, name):
        return ""
    value, low, high = (metrics[f"{name}{end}"] for end in ("", *ENDS))
    # At an end of its interval, as a share of 0 is, a value has no symmetric error.
    if value in (low, high):
        return f"{value:.3g}" if low == high else f"{low:.2g} to {high:.2g}"
    if not math.isfinite(high - low):
        return f"{value:.3g}"
    places = max(0, -math.floor(math.log10((high - low) / 2)))
    return f"{value:.{places}f} ±{(high - low) / 2:.{places}f}"


def print_missing_lc_win_rate(owner: str, metrics: Mapping[str, Any]) -> None:
    """Print why the length-controlled win rate is missing, if it is."""
    if "length_overlap" in metrics and not is_measured(metrics, COMPARED[1]):
        longer = f"one side is longer in {1 - metrics['length_overlap']:.1%} of the comparisons"
        print(f"LC win rate{owner} is not identified: {longer}, so the effect of length cannot be separated")


def print_slices(slices: Mapping[str, Mapping[str, Any]], side: str, alone: bool) -> None:
    """Print a table for each column of the prompts that defines slices, with a row for each slice."""
    for name in dict.fromkeys(key.partition("=")[0] for key in slices):
        of_column = {key.partition("=")[2]: metrics for key, metrics in slices.items() if key.startswith(f"{name}=")}
        rows = {escape_text(value): policy_rows(metrics)[side] for value, metrics in of_column.items()}
        names = [each for each in main_metrics(rows) if each != COMPARED[1]]
        columns = {"prompts": {escape_text(value): str(metrics["prompts"]) for value, metrics in of_column.items()}}
        columns |= {heading(each): {value: narrow(row, each) for value, row in rows.items()} for each in names}
        print_table(f"by {escape_text(name)}" + ("" if alone else f": {side}"), columns)
        small = {value: metrics["prompts"] for value, metrics in of_column.items() if metrics["prompts"] < FEW_PROMPTS}
        if small:
            counts = ", ".join(f"{literal(value)} {count}" for value, count in small.items())
            print(f"fewer than {FEW_PROMPTS} prompts, so hardly informative: {counts}")


def escape_text(text: str) -> str:
    """Escape text from a data file for a table, in which rich reads square brackets as markup."""
    return escape(literal(text))


def print_best_of_curve(side: str, curve: list[Mapping[str, Any]], metrics: Mapping[str, Any]) -> None:
    """Print the best-of-n curve of a policy. In that of `against`, each policy has a row at its KL."""
    left_out = metrics["prompts"] - (curve[0]["prompts"] if curve else 0)
    if left_out:
        print(f"best of n responses of {side}: {left_out} prompts are left out, because a response has no score")
    if not curve:
        return
    most = len(curve)
    rows = {f"n = {point['n']}": point for point in curve if point["n"] in {most, *SHOWN_N}}
    columns = {"kl": {title: f"<= {point['kl_bound']:.3g}" for title, point in rows.items()}}
    if side == "against":
        rows |= policy_rows(metrics)
        columns["kl"] |= {name: narrow(policy, "kl") for name, policy in policy_rows(metrics).items()}
    for name in [*scorer_metrics(curve[0]), "length"]:
        columns[heading(name)] = {title: narrow(row, name) for title, row in rows.items()}
    print_table(f"best of n responses of {side}, chosen by the score", columns)
    for name, policy in policy_rows(metrics).items() if side == "against" else []:
        equal_n = policy["worth_best_of"]
        worth = f"about the best of {equal_n}" if equal_n else f"more than the best of {most}"
        print(f"by the score, a response of {name} is worth {worth} responses of against")


def scorer_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return `score` and the scorers. A scorer that equals the score everywhere is left out."""
    # A single scorer of weight 1 is the score, and would be shown twice.
    scorers = [name for name in metrics if name.startswith("rewards/") and f"{name}_low" in metrics]
    return ["score", *(name for name in scorers if metrics[name] != metrics.get("score"))]


def heading(name: str) -> str:
    return metric_title(name).removeprefix("rewards/")


def print_frontier(frontier: Mapping[str, Any]) -> None:
    """Print the fit of Gao et al. 2022 (arXiv 2210.10760) to the score, and to each scorer that differs from it."""
    print("score over KL, as start + d (alpha - beta ln d) with d the square root of the KL:")
    for name in scorer_metrics(frontier["points"][-1]):
        fit = frontier["fits"][name]
        if fit is None:
            count = len(frontier["points"])
            print(f"  {name}: {count} policies are too few, a fit needs 4 (checkpoint.keep: 0 keeps all checkpoints)")
        else:
            numbers = f"alpha {fit['alpha']:.3g}, beta {fit['beta']:.3g}, residual {fit['residual']:.2g}"
            print(f"  {name}: {fit['says']} ({numbers})")


def print_people(people: Mapping[str, Any]) -> None:
    rows = {metric_title(name): cell(people, name) for name in COMPARED if name in people}
    if "agreement" in people:
        rows["agreement with the scorer"] = cell(people, "agreement")
    counts = f"{people['judgements']} judgements of {people['judged_pairs']} pairs by {people['raters']} people"
    print_table(f"by people: {counts}", {"": rows})
    print_missing_lc_win_rate(" by people", people)
    for name, description in {
        "unjudged_pairs": "pairs without a judgement are left out",
        "equal_pairs": "pairs of two equal responses count as ties",
        "others": "rankings in the file are of other pairs",
    }.items():
        if people[name]:
            print(f"{people[name]} {description}")


def print_pairs(pairs: Mapping[str, Any]) -> None:
    print(f"{pairs['pairs']} blind pairs: {pairs['file']}; which policy wrote what: {pairs['key']} (not for raters)")
    if pairs["equal"]:
        print(f"{pairs['equal']} prompts got the same response from both policies: ties that need no judgement")
    store = pairs["file"].removesuffix(".jsonl") + ".db"
    print(f"next: keel rank {pairs['file']} --mode pairs --store {store}")
    print(f"then: keel rank --store {store} --export judged.jsonl, and this command with --judgements judged.jsonl")


def print_gate(gate: Mapping[str, Any]) -> None:
    passed = sum(row["passed"] for row in gate["demands"])
    print(f"gate: {'passed' if gate['passed'] else 'NOT PASSED'}, {passed} of {len(gate['demands'])} demands are met")
    for row in gate["demands"]:
        interval = "" if row["interval"] is None else f" [{row['interval'][0]:.3g}, {row['interval'][1]:.3g}]"
        print(f"  {'passed' if row['passed'] else 'FAILED'}  {literal(row['says'])}{interval}")
