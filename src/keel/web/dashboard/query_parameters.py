"""Parsing of the query parameters of a request. Invalid values are refused."""

import math
from collections.abc import Mapping

from keel.run.read.responses import Range
from keel.server.limits import Refused
from keel.web.dashboard.response_list import SORTS, ResponseQuery

MAX_LENGTH = 500  # characters
MAX_INTEGER = 2**53  # JavaScript represents integers exactly up to here


class QueryParameters:
    """The query and path parameters of a request. Each method raises Refused for an invalid value."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    def text(self, name: str) -> str:
        """Return a parameter as text, empty if it is missing."""
        text = self.values.get(name, "")
        if len(text) > MAX_LENGTH:
            raise Refused(400, f"{name} is longer than {MAX_LENGTH} characters")
        return text

    def number(self, name: str) -> float | None:
        text = self.text(name)
        try:
            value = float(text) if text else None
        except ValueError:
            value = math.nan
        if value is not None and not math.isfinite(value):
            raise Refused(400, f"{name} is not a number")
        return value

    def count(self, name: str, default: int, most: int = MAX_INTEGER) -> int:
        value = self.number(name)
        if value is None:
            return default
        if value != int(value) or not -1 <= value <= most:
            raise Refused(400, f"{name} is not a whole number up to {most}")
        return int(value)

    def choice(self, name: str, *choices: str) -> str:
        """Return one of the choices; the first if the parameter is missing."""
        text = self.text(name) or choices[0]
        if text not in choices:
            raise Refused(400, f"{name} must be one of: {', '.join(choices)}")
        return text

    def range(self, name: str) -> Range:
        return self.number(f"{name}_from"), self.number(f"{name}_to")

    def response_query(self) -> ResponseQuery:
        truncated = self.choice("truncated", "any", "yes", "no")
        until = self.count("until", -1)
        return ResponseQuery(
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
