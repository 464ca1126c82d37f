"""What a page asks for in the address of a request. Whatever does not fit is refused."""

import math
from collections.abc import Mapping

from keel.run.read.responses import Range
from keel.server.limits import Refused
from keel.web.dashboard.response_list import SORTS, Query

LONGEST = 500  # characters
LARGEST = 2**53  # whole numbers that a page can hold


class QueryParameters:
    """The values in an address, by name."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    def text(self, name: str) -> str:
        """Empty when it is not there. Raises Refused, as all of these do."""
        text = self.values.get(name, "")
        if len(text) > LONGEST:
            raise Refused(400, f"{name} is longer than {LONGEST} characters")
        return text

    def number(self, name: str) -> float | None:
        text = self.text(name)
        try:
            value = float(text) if text else None
        except ValueError:
            value = math.nan
        if value is not None and not math.isfinite(value):
            raise Refused(400, f"{name} is no number")
        return value

    def count(self, name: str, default: int, most: int = LARGEST) -> int:
        value = self.number(name)
        if value is None:
            return default
        if value != int(value) or not -1 <= value <= most:
            raise Refused(400, f"{name} is no whole number up to {most}")
        return int(value)

    def choice(self, name: str, *choices: str) -> str:
        """The first when it is not there."""
        text = self.text(name) or choices[0]
        if text not in choices:
            raise Refused(400, f"{name} is one of: {', '.join(choices)}")
        return text

    def range(self, name: str) -> Range:
        return self.number(f"{name}_from"), self.number(f"{name}_to")

    def query(self) -> Query:
        truncated = self.choice("truncated", "any", "yes", "no")
        until = self.count("until", -1)
        return Query(
            self.range("score"),
            self.range("kl"),
            self.range("length"),
            self.range("step"),
            truncated=None if truncated == "any" else truncated == "yes",
            text=self.text("text").strip(),
            sort=self.choice("sort", *SORTS),
            descending=self.choice("order", "down", "up") == "down",
            until=None if until < 0 else until,
        )
