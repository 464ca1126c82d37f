"""Wait for asynchronous results from synchronous code."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any


class EventLoop:
    """An event loop that lives as long as this object, so that clients and locks of one call work in the next."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def outcome(self, awaitable: Awaitable[Any]) -> Any:
        """Wait for the result, if possible in this thread, where a signal can interrupt the wait."""

        async def result() -> Any:
            return await awaitable

        return _outside_of_loops(partial(self._runner.run, result()))

    def close(self) -> None:
        """Cancel the remaining jobs of the loop."""
        _outside_of_loops(self._runner.close)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_finalizing():  # the names of this module may be gone
            return
        # Garbage is collected anywhere, even inside ThreadPoolExecutor.submit while it holds a lock. A thread that was
        # started here would wait for that lock, and this thread for the thread.
        with suppress(RuntimeError):  # an abandoned job still runs in the loop
            if _runs_loop():
                self._runner.get_loop().close()
            else:
                self._runner.close()


def outcome(awaitable: Awaitable[Any]) -> Any:
    """Wait for the result in a new event loop."""
    loop = EventLoop()
    try:
        return loop.outcome(awaitable)
    finally:
        loop.close()


def _outside_of_loops(job: Callable[[], Any]) -> Any:
    """Run the job and return its result. In a notebook, which already runs an event loop, a thread runs the job."""
    if not _runs_loop():
        return job()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(job).result()


def _runs_loop() -> bool:
    """Whether this thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
