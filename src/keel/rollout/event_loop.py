"""Waiting for what runs asynchronously, from code that does not."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any


class EventLoop:
    """An event loop that lives as long as this object: clients and locks of one call still work in the next."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def outcome(self, awaitable: Awaitable[Any]) -> Any:
        """Wait for the result, in this thread where that is possible: a signal then ends the wait."""

        async def result() -> Any:
            return await awaitable

        return _outside_of_loops(partial(self._runner.run, result()))

    def close(self) -> None:
        """Cancel what is left to do in it."""
        _outside_of_loops(self._runner.close)

    def __del__(self) -> None:
        with suppress(RuntimeError):  # a job that was left behind is still running in it
            self.close()


def outcome(awaitable: Awaitable[Any]) -> Any:
    """Wait for the result in an event loop made for it."""
    loop = EventLoop()
    try:
        return loop.outcome(awaitable)
    finally:
        loop.close()


def _outside_of_loops(job: Callable[[], Any]) -> Any:
    """The job's result; in a notebook, whose event loop is running already, a thread does the job."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return job()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(job).result()
