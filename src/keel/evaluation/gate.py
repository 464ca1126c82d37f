"""A gate before a release: what a policy's figures must reach, read strictly, and a verdict that travels with them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.config import nearest
from keel.errors import ConfigError
from keel.files import read_regular

DEMAND = re.compile(
    r"(?:(?P<end>low|high)\(\s*)?"
    r"(?:slice\[(?P<slice>[^\]]+)\]\.)?(?P<figure>[\w./:@-]+)\s*(?P<close>\))?\s*"
    r"(?P<sign>>=|<=|>|<)\s*(?P<bound>\S+)"
)
SAFE = {"low": (">", ">="), "high": ("<", "<=")}
ALONE = ("prompts", "length_overlap", "people.length_overlap")  # figures without an interval
COUNTS = ("prompts", "people.prompts", "people.judgements", "people.raters")
FEWEST = 10  # prompts of a figure; from here on every interval holds its coverage (docs/evaluation.md, "Coverage")
FEW = 20  # prompts; with fewer their number is shown
NOT_IDENTIFIED = "is not identified: one side is longer in {:.1%} of the comparisons"


@dataclass(frozen=True)
class Demand:
    """One thing that is asked for, as in `low(slice[refund].score)>=0`."""

    text: str
    metric: str
    slice: str | None
    end: str  # low or high: that end of the interval, "": the figure itself
    sign: str
    bound: float

    @property
    def subject(self) -> str:
        metric = f"slice[{self.slice}].{self.metric}" if self.slice else self.metric
        return f"{self.end}({metric})" if self.end else metric

    def holds(self, value: float) -> bool:
        """False for nan."""
        match self.sign:
            case ">=":
                return value >= self.bound
            case "<=":
                return value <= self.bound
            case ">":
                return value > self.bound
        return value < self.bound


def read_gate(gate: str) -> list[Demand]:
    """Demands separated by commas or lines, or the name of a file of them; `#` begins a comment.

    Raises ConfigError for anything that is no demand.
    """
    text = gate
    if gate.strip() and not re.search(r"[<>]", gate):
        try:
            text = read_regular(gate).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{gate!r} is neither a demand nor a file", "gate", 'as in "score>=0, kl<=20"') from error
    text = "\n".join(line.partition("#")[0] for line in text.splitlines())
    parts = [part.strip() for part in re.split(r"[,\n](?![^\[\n]*\])", text)]
    demands = [_demand(part) for part in parts if part]
    if not demands:
        raise ConfigError("asks for nothing", where=f"gate {gate}".strip(), fix="write a demand such as win_rate>=0.6")
    return demands


def _demand(text: str) -> Demand:
    found = DEMAND.fullmatch(text)
    if found is None or bool(found["end"]) != bool(found["close"]):
        raise ConfigError(
            f"cannot read {text!r}", "gate", "write FIGURE>=NUMBER, low(FIGURE)>=NUMBER or slice[VALUE].FIGURE<=NUMBER"
        )
    try:
        bound = float(found["bound"])
    except ValueError:
        bound = float("nan")
    if not abs(bound) < float("inf"):
        raise ConfigError(
            f"{found['bound']!r} in {text!r} is no number", "gate", fix="write a number after the comparison"
        )
    end = found["end"] or ""
    if end and found["sign"] not in SAFE[end]:
        other = "high" if end == "low" else "low"
        raise ConfigError(
            f"{text!r} asks of the end that flatters", "gate", f"the safe end is {other}({found['figure']})"
        )
    return Demand(text, found["figure"], found["slice"], end, found["sign"], bound)


def check_demands(demands: Sequence[Demand], metrics: Sequence[str], slices: Sequence[str]) -> None:
    """Raises ConfigError for a figure or slice that nobody could measure. `slices` are `COLUMN=VALUE`."""
    for demand in demands:
        if demand.metric not in metrics:
            raise ConfigError(f"no figure is called {demand.metric!r}; {nearest(demand.metric, list(metrics))}", "gate")
        if demand.end and demand.metric in ALONE:
            raise ConfigError(
                f"{demand.metric} has no interval",
                f"gate {demand.text}",
                fix="demand the metric itself, without low() or high()",
            )
        if demand.slice is not None:
            find_slice(demand.slice, slices)


def find_slice(name: str, slices: Sequence[str]) -> str:
    """The slice of this value, or of this `COLUMN=VALUE`. Raises ConfigError when there is none, or more than one."""
    found = [key for key in slices if name in (key, key.partition("=")[2])]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"slice[{name}] may be {' or '.join(found)}", "gate", f"write slice[{found[0]}]")
    if not slices:
        raise ConfigError(f"slice[{name}]: there are no slices", "gate", "name columns of the prompts with slices")
    known = [key.partition("=")[2] for key in slices]
    raise ConfigError(f"no prompt is in slice[{name}]; {nearest(name, known)}", "gate")


def gate_verdict(demands: Sequence[Demand], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the figures of `keel evaluate` of one policy meet the demands.

    What was not measured never passes, nor does a figure of fewer than FEWEST prompts.
    """
    slices = metrics.get("slices", {})
    rows = []
    for demand in demands:
        own = metrics if demand.slice is None else slices.get(find_slice(demand.slice, list(slices)), {})
        found = numeric_metrics(own)
        prompts = num_prompts(demand, found)
        is_enough = prompts >= FEWEST
        value = found.get(f"{demand.metric}_{demand.end}" if demand.end else demand.metric) if is_enough else None
        passed = value is not None and demand.holds(value)
        interval = [found.get(f"{demand.metric}_{end}") for end in ("low", "high")]
        rows.append(
            {
                "demand": demand.text,
                "measured": found.get(demand.metric),
                "interval": None if None in interval else interval,
                "passed": passed,
                "says": describe_demand(demand, value, passed, prompts, found),
            }
        )
    failed = [row["says"] for row in rows if not row["passed"]]
    return {"passed": not failed, "failed": failed, "demands": rows}


def numeric_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the policy, of its comparison, and of people's, by the name that a gate has for it."""
    own = {**metrics, **metrics.get("policy", {})}
    own |= {f"people.{name}": value for name, value in metrics.get("people", {}).items()}
    return {name: value for name, value in own.items() if isinstance(value, int | float) and value == value}


def num_prompts(demand: Demand, found: Mapping[str, float]) -> float:
    """Of how many prompts the figure is; inf for one that is itself a count, or where nobody counted."""
    counted = "people.prompts" if demand.metric.startswith("people.") else "prompts"
    return math.inf if demand.metric in COUNTS else found.get(counted, math.inf)


def describe_demand(
    demand: Demand, value: float | None, passed: bool, prompts: float, found: Mapping[str, float]
) -> str:
    if prompts < FEWEST:
        return f"{demand.subject} needs at least {FEWEST} prompts, has {prompts:g}"
    if value is None:
        overlap = found.get(demand.metric.replace("length_controlled_win_rate", "length_overlap"))
        if demand.metric.endswith("length_controlled_win_rate") and overlap is not None:
            return f"{demand.subject} {NOT_IDENTIFIED.format(1 - overlap)}"
        return f"{demand.subject} was not measured"
    few = f" (of {prompts:g} prompts only)" if prompts < FEW else ""
    shown = f"{value:.4g}"
    if not passed and demand.holds(float(shown)):  # rounding may not make it look as if it held
        shown = repr(value)
    return f"{demand.subject} {shown} {'is' if passed else 'is not'} {demand.sign} {demand.bound:g}{few}"
