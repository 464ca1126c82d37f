"""Waiting for what runs asynchronously, from code that does not."""

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def outcome(awaitable: Awaitable[Any]) -> Any:
    """Its result. In a notebook, whose event loop runs already, a thread waits for it; elsewhere this one does, so
    that a signal ends the wait."""

    async def result() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(result())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, result()).result()
