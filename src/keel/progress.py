"""Show the progress of a stage: a bar with the time left and the main metrics."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class _SafeStream:
    """A stream that ignores write errors, so that a closed pipe or terminal does not end the run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class ProgressDisplay:
    """A live bar on a terminal, or a line every ten seconds elsewhere. Writes to standard error."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.first = title, total, done
        self.console = Console(file=cast(TextIO, _SafeStream(sys.stderr)))
        # Stored, because it becomes false when the terminal is closed, and the bar must still be stopped.
        self.is_live = self.console.is_terminal
        self.started, self.last_line = time.monotonic(), time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=self.console)
        self.task = self.bar.add_task(title, total=total, completed=done, metrics="")

    def __enter__(self) -> Self:
        if self.is_live:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_live:
            self.bar.stop()

    def show(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show that `done` of the total are done, with metrics such as {"score": 0.31, "kl": 2.0}."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
        self.bar.update(self.task, completed=done, metrics=text)
        now = time.monotonic()
        if not self.is_live and (now - self.last_line > SECONDS_BETWEEN_LINES or done == self.total):
            self.last_line = now
            # The rate is that of this process: a resumed run starts at `first`.
            left = (now - self.started) / max(1, done - self.first) * (self.total - done)
            self.console.print(f"{self.title} {done}/{self.total}  {text}  {left:.0f} s left", soft_wrap=True)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
