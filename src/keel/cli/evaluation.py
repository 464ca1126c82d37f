"""What `keel evaluate` found, on the terminal."""

import math
from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from keel.cli.tables import format_interval, number, show
from keel.terminal import literal

COMPARED = ("win_rate", "length_controlled_win_rate", "score_difference", "ties")
MOST_COLUMNS = 3
FEW = 20  # prompts: a slice of fewer is named
ENDS = ("_low", "_high")
SHOWN_N = {n for i in range(12) for n in (2**i, 3 * 2**i)}  # rows of a best-of-n table, besides the last


def print_evaluation(metrics: Mapping[str, Any]) -> None:
    """The table of all prompts first, then what was asked for besides, the verdict of the gate last."""
    policies = policy_rows(metrics)
    print_sides(metrics, policies | ({"against": metrics["against"]} if "against" in metrics else {}))
    print("with 95% intervals over prompts, ± half of one")
    if any("win_rate" in found for found in policies.values()):
        by = literal(metrics.get("judge", "the score"))
        print(f"wins and score difference: of each policy over `against`, by {by}; a tie is half a win")
    for side, found in policies.items():
        print_missing_lc_win_rate("" if len(policies) == 1 else f" of {literal(side)}", found)
    for side in list(policies)[-1:] if "frontier" in metrics else policies:
        print_slices(metrics.get("slices", {}), side, alone=len(policies) == 1)
    for side, curve in metrics.get("best_of", {}).items():
        print_best_of_curve(side, curve, metrics)
    for part, tell in {
        "frontier": print_frontier,
        "people": print_people,
        "pairs": print_pairs,
        "gate": print_gate,
    }.items():
        if part in metrics:
            tell(metrics[part])


def print_sides(metrics: Mapping[str, Any], sides: Mapping[str, Mapping[str, Any]]) -> None:
    """A column for each side; of many, a row with the main figures."""
    rows = f" in {metrics['rows']} rows" if "rows" in metrics else ""
    title = f"{metrics['prompts']} prompts{rows}, {metrics['responses_per_prompt']} answers to each"
    if len(sides) <= MOST_COLUMNS:
        show(title, {side: column(found) for side, found in sides.items()})
        return
    names = main_metrics(sides)
    show(title, {heading(name): {side: narrow(found, name) for side, found in sides.items()} for name in names})


def main_metrics(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Those for which a table of many rows has room, as far as one of the rows has them."""
    scorers = scorer_metrics(next(iter(rows.values())))
    cut = ["truncated"] if any(found["truncated"] for found in rows.values()) else []
    names = [*COMPARED[:2], *scorers, "kl", "length", *cut]
    return [name for name in names if any(name in found for found in rows.values())]


def policy_rows(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> figures of each policy, those of its comparison among them."""
    compared = {name: value for name, value in metrics.items() if name.startswith((*COMPARED, "length_overlap"))}
    return metrics.get("policies") or {"policy": metrics["policy"] | compared}


def column(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The rows of one policy: what came of the comparison first."""
    names = [name for name in metrics if f"{name}_low" in metrics]
    ordered = [name for name in COMPARED if name in names] + [name for name in names if name not in COMPARED]
    return {metric_title(name): cell(metrics, name) for name in ordered}


def metric_title(name: str) -> str:
    """The name of a figure as a row or a column bears it; LC as on the leaderboards that brought it up."""
    return name.replace("length_controlled", "LC").replace("_", " ") if name in COMPARED else name


def cell(metrics: Mapping[str, Any], name: str) -> str:
    """`0.71 [0.66, 0.76]`, nothing for what was not measured."""
    if not is_measured(metrics, name):
        return ""
    return format_interval(short(metrics), name) if f"{name}_low" in metrics else number(metrics[name])


def is_measured(metrics: Mapping[str, Any], name: str) -> bool:
    return math.isfinite(metrics.get(name, math.nan))


def short(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Three significant digits: more would be a pretence beside such intervals."""
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in metrics.items()}


def narrow(metrics: Mapping[str, Any], name: str) -> str:
    """`0.71 ±0.05`: half the interval's width, where columns stand close."""
    if not is_measured(metrics, name):
        return ""
    value, low, high = (metrics[f"{name}{end}"] for end in ("", *ENDS))
    if value in (low, high):
        return f"{value:.3g}" if low == high else f"{low:.2g} to {high:.2g}"
    if not math.isfinite(high - low):
        return f"{value:.3g}"
    places = max(0, -math.floor(math.log10((high - low) / 2)))
    return f"{value:.{places}f} ±{(high - low) / 2:.{places}f}"


def print_missing_lc_win_rate(whose: str, metrics: Mapping[str, Any]) -> None:
    """Say why there is no length-controlled win rate, where there is none."""
    if "length_overlap" in metrics and not is_measured(metrics, COMPARED[1]):
        longer = f"one side is longer in {1 - metrics['length_overlap']:.1%} of the comparisons"
        print(f"LC win rate{whose} is not identified: {longer}, so the effect of length cannot be separated")


def print_slices(slices: Mapping[str, Mapping[str, Any]], side: str, alone: bool) -> None:
    """One row for each slice, one table for each column of the prompts."""
    for name in dict.fromkeys(key.partition("=")[0] for key in slices):
        own = {escape_text(key.partition("=")[2]): found for key, found in slices.items() if key.startswith(f"{name}=")}
        rows = {value: policy_rows(found)[side] for value, found in own.items()}
        known = [each for each in main_metrics(rows) if each != COMPARED[1]]
        columns = {"prompts": {value: str(found["prompts"]) for value, found in own.items()}}
        columns |= {heading(each): {value: narrow(found, each) for value, found in rows.items()} for each in known}
        show(f"by {escape_text(name)}" + ("" if alone else f": {side}"), columns)
        few = [f"{literal(key.partition('=')[2])} {found['prompts']}" for key, found in slices.items()
               if found["prompts"] < FEW and key.startswith(f"{name}=")]  # fmt: skip
        if few:
            print(f"of fewer than {FEW} prompts, too few to say much: {', '.join(few)}")


def escape_text(text: str) -> str:
    """Somebody else's text in a table, which would read marks in square brackets."""
    return escape(literal(text))


def print_best_of_curve(side: str, curve: list[Mapping[str, Any]], metrics: Mapping[str, Any]) -> None:
    """The curve, and on that of `against` where the policies stand at their own KL."""
    left_out = metrics["prompts"] - (curve[0]["prompts"] if curve else 0)
    if left_out:
        print(f"best of n answers of {side}: {left_out} prompts are left out, of which an answer has no score")
    if not curve:
        return
    most = len(curve)
    chosen = [point for point in curve if point["n"] in {most, *SHOWN_N}]
    rows = {f"n = {point['n']}": point for point in chosen}
    columns = {"kl": {title: f"<= {point['kl_bound']:.3g}" for title, point in rows.items()}}
    if side == "against":
        rows |= policy_rows(metrics)
        columns["kl"] |= {name: narrow(found, "kl") for name, found in policy_rows(metrics).items()}
    for name in [*scorer_metrics(curve[0]), "length"]:
        columns[heading(name)] = {title: narrow(found, name) for title, found in rows.items()}
    show(f"best of n answers of {side}, chosen by the score", columns)
    for name, found in policy_rows(metrics).items() if side == "against" else []:
        reached = found["worth_best_of"]
        worth = f"about the best of {reached}" if reached else f"more than the best of {most}"
        print(f"by the score an answer of {name} is worth {worth} of against")


def scorer_metrics(found: Mapping[str, Any]) -> list[str]:
    """The score and the scorers, without the one that is the score."""
    scorers = [name for name in found if name.startswith("rewards/") and f"{name}_low" in found]
    return ["score", *(name for name in scorers if found[name] != found.get("score"))]


def heading(name: str) -> str:
    return metric_title(name).removeprefix("rewards/")


def print_frontier(found: Mapping[str, Any]) -> None:
    """What the form of Gao et al. says of the score and of each scorer that is not the score."""
    print("score over KL, as start + d (alpha - beta ln d) with d the square root of the KL:")
    for name in scorer_metrics(found["points"][-1]):
        fitted = found["fits"][name]
        if fitted is None:
            count = len(found["points"])
            print(f"  {name}: too few to say: {count} policies, a fit takes 4 (checkpoint.keep: 0 keeps all)")
        else:
            print(f"  {name}: {fitted['says']} (alpha {fitted['alpha']:.3g}, beta {fitted['beta']:.3g}, "
                  f"off by {fitted['residual']:.2g})")  # fmt: skip


def print_people(people: Mapping[str, Any]) -> None:
    rows = {metric_title(name): cell(people, name) for name in COMPARED if name in people}
    if "agreement" in people:
        rows["agreement with the scorer"] = cell(people, "agreement")
    counted = f"{people['judgements']} judgements of {people['judged_pairs']} pairs by {people['raters']} people"
    show(f"by people: {counted}", {"": rows})
    print_missing_lc_win_rate(" by people", people)
    for name, what in {
        "unjudged_pairs": "pairs nobody judged are left out",
        "equal_pairs": "pairs of two equal answers count as ties",
        "others": "rankings in the file are not of these pairs",
    }.items():
        if people[name]:
            print(f"{people[name]} {what}")


def print_pairs(pairs: Mapping[str, Any]) -> None:
    print(f"{pairs['pairs']} blind pairs: {pairs['file']}, and whose answer is whose: {pairs['key']} (not for raters)")
    if pairs["equal"]:
        print(f"{pairs['equal']} prompts got the same answer from both: ties that nobody has to judge")
    store = pairs["file"].removesuffix(".jsonl") + ".db"
    print(f"next: keel rank {pairs['file']} --mode pairs --store {store}")
    print(f"then: keel rank --store {store} --export judged.jsonl, and this command with --judgements judged.jsonl")


def print_gate(gate: Mapping[str, Any]) -> None:
    passed = sum(row["passed"] for row in gate["demands"])
    print(f"gate: {'passed' if gate['passed'] else 'NOT PASSED'}, {passed} of {len(gate['demands'])} demands are met")
    for row in gate["demands"]:
        ends = "" if row["interval"] is None else f" [{row['interval'][0]:.3g}, {row['interval'][1]:.3g}]"
        print(f"  {'passed' if row['passed'] else 'FAILED'}  {literal(row['says'])}{ends}")
