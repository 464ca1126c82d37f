"""The release gate of `keel evaluate`: parse its demands, check them against the metrics, and report the verdict."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.config import suggestion
from keel.errors import ConfigError
from keel.files import read_regular

DEMAND = re.compile(
    r"(?:(?P<end>low|high)\(\s*)?"
    r"(?:slice\[(?P<slice>[^\]]+)\]\.)?(?P<metric>[\w./:@-]+)\s*(?P<close>\))?\s*"
    r"(?P<sign>>=|<=|>|<)\s*(?P<bound>\S+)"
)
SAFE = {"low": (">", ">="), "high": ("<", "<=")}
ALONE = ("prompts", "length_overlap", "people.length_overlap")  # metrics without an interval
COUNTS = ("prompts", "people.prompts", "people.judgements", "people.raters")
FEWEST = 10  # prompts of a metric; with fewer, intervals miss their coverage (docs/evaluation.md, "Coverage")
FEW = 20  # prompts; a metric of fewer is reported with their number
NOT_IDENTIFIED = "is not identified: one side is longer in {:.1%} of the comparisons"


@dataclass(frozen=True)
class Demand:
    """A bound on one metric, such as `low(slice[refund].score)>=0`."""

    text: str
    metric: str
    slice: str | None
    end: str  # low or high: that end of the interval; "": the metric itself
    sign: str
    bound: float

    @property
    def subject(self) -> str:
        metric = f"slice[{self.slice}].{self.metric}" if self.slice else self.metric
        return f"{self.end}({metric})" if self.end else metric

    def holds(self, value: float) -> bool:
        """Whether the value meets the bound; NaN never does."""
        match self.sign:
            case ">=":
                return value >= self.bound
            case "<=":
                return value <= self.bound
            case ">":
                return value > self.bound
        return value < self.bound


def read_gate(gate: str) -> list[Demand]:
    """Parse demands that are separated by commas or line breaks, or the file of that name. `#` begins a comment.

    Raises ConfigError for text that is not a demand.
    """
    text = gate
    if gate.strip() and not re.search(r"[<>]", gate):
        try:
            text = read_regular(gate).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{gate!r} is neither a demand nor a file", "gate", 'write demands such as "score>=0, kl<=20"'
            ) from error
    text = "\n".join(line.partition("#")[0] for line in text.splitlines())
    parts = [part.strip() for part in re.split(r"[,\n](?![^\[\n]*\])", text)]
    demands = [_demand(part) for part in parts if part]
    if not demands:
        raise ConfigError(
            "the gate has no demand", where=f"gate {gate}".strip(), fix="write a demand such as win_rate>=0.6"
        )
    return demands


def _demand(text: str) -> Demand:
    match = DEMAND.fullmatch(text)
    if match is None or bool(match["end"]) != bool(match["close"]):
        raise ConfigError(
            f"cannot read {text!r}", "gate", "write METRIC>=NUMBER, low(METRIC)>=NUMBER or slice[VALUE].METRIC<=NUMBER"
        )
    try:
        bound = float(match["bound"])
    except ValueError:
        bound = float("nan")
    if not abs(bound) < float("inf"):
        raise ConfigError(
            f"{match['bound']!r} in {text!r} is not a number", "gate", fix="write a number after the comparison"
        )
    end = match["end"] or ""
    if end and match["sign"] not in SAFE[end]:
        other = "high" if end == "low" else "low"
        raise ConfigError(
            f"{text!r} tests the optimistic end of the interval", "gate", f"write {other}({match['metric']})"
        )
    return Demand(text, match["metric"], match["slice"], end, match["sign"], bound)


def check_demands(demands: Sequence[Demand], metrics: Sequence[str], slices: Sequence[str]) -> None:
    """Raise ConfigError for a metric or slice that does not exist. `slices` are `COLUMN=VALUE`."""
    for demand in demands:
        if demand.metric not in metrics:
            raise ConfigError(
                f"no metric is called {demand.metric!r}; {suggestion(demand.metric, list(metrics))}", "gate"
            )
        if demand.end and demand.metric in ALONE:
            raise ConfigError(
                f"{demand.metric} has no interval",
                f"gate {demand.text}",
                fix="demand the metric itself, without low() or high()",
            )
        if demand.slice is not None:
            find_slice(demand.slice, slices)


def find_slice(name: str, slices: Sequence[str]) -> str:
    """Return the slice with this VALUE or `COLUMN=VALUE`. Raises ConfigError unless there is exactly one."""
    matches = [key for key in slices if name in (key, key.partition("=")[2])]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"slice[{name}] may be {' or '.join(matches)}", "gate", f"write slice[{matches[0]}]")
    if not slices:
        raise ConfigError(f"slice[{name}]: there are no slices", "gate", "name columns of the prompts with slices")
    values = [key.partition("=")[2] for key in slices]
    raise ConfigError(f"no prompt is in slice[{name}]; {suggestion(name, values)}", "gate")


def gate_verdict(demands: Sequence[Demand], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Check the metrics of one policy against the demands.

    A metric that was not measured fails, and so does a metric of fewer than FEWEST prompts.
    """
    slices = metrics.get("slices", {})
    rows = []
    for demand in demands:
        scope = metrics if demand.slice is None else slices.get(find_slice(demand.slice, list(slices)), {})
        by_name = numeric_metrics(scope)
        prompts = num_prompts(demand, by_name)
        is_enough = prompts >= FEWEST
        value = by_name.get(f"{demand.metric}_{demand.end}" if demand.end else demand.metric) if is_enough else None
        passed = value is not None and demand.holds(value)
        interval = [by_name.get(f"{demand.metric}_{end}") for end in ("low", "high")]
        rows.append(
            {
                "demand": demand.text,
                "measured": by_name.get(demand.metric),
                "interval": None if None in interval else interval,
                "passed": passed,
                "says": describe_demand(demand, value, passed, prompts, by_name),
            }
        )
    failed = [row["says"] for row in rows if not row["passed"]]
    return {"passed": not failed, "failed": failed, "demands": rows}


def numeric_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return all numbers of the policy, its comparison and people, by the names that a gate uses. NaN is left out."""
    by_name = {**metrics, **metrics.get("policy", {})}
    by_name |= {f"people.{name}": value for name, value in metrics.get("people", {}).items()}
    return {name: value for name, value in by_name.items() if isinstance(value, int | float) and value == value}


def num_prompts(demand: Demand, metrics: Mapping[str, float]) -> float:
    """Return the number of prompts behind a metric; inf for a metric that is itself a count, or if it is unknown."""
    count = "people.prompts" if demand.metric.startswith("people.") else "prompts"
    return math.inf if demand.metric in COUNTS else metrics.get(count, math.inf)


def describe_demand(
    demand: Demand, value: float | None, passed: bool, prompts: float, metrics: Mapping[str, float]
) -> str:
    """Describe in one line whether the demand is met, or why the value is missing."""
    if prompts < FEWEST:
        return f"{demand.subject} needs at least {FEWEST} prompts, has {prompts:g}"
    if value is None:
        overlap = metrics.get(demand.metric.replace("length_controlled_win_rate", "length_overlap"))
        if demand.metric.endswith("length_controlled_win_rate") and overlap is not None:
            return f"{demand.subject} {NOT_IDENTIFIED.format(1 - overlap)}"
        return f"{demand.subject} was not measured"
    few = f" (of {prompts:g} prompts only)" if prompts < FEW else ""
    shown = f"{value:.4g}"
    if not passed and demand.holds(float(shown)):  # the rounded value would meet the bound and confuse the reader
        shown = repr(value)
    return f"{demand.subject} {shown} {'is' if passed else 'is not'} {demand.sign} {demand.bound:g}{few}"
