"""Asynchronous results in synchronous code."""

import asyncio
import concurrent.futures.thread
import threading

from keel.endpoints.event_loop import EventLoop, outcome


async def three() -> int:
    await asyncio.sleep(0)
    return 3


def test_results_arrive_with_and_without_a_loop_around() -> None:
    async def around() -> int:
        return int(outcome(three()))

    assert outcome(three()) == 3
    assert asyncio.run(around()) == 3


def test_an_abandoned_loop_is_closed_without_a_thread() -> None:
    """Garbage collection inside ThreadPoolExecutor.submit holds the lock that a new thread would wait for."""
    lock = concurrent.futures.thread._global_shutdown_lock

    async def around() -> bool:
        loop = EventLoop()
        loop.outcome(three())
        closing = threading.Thread(target=drop, args=([loop],), daemon=True)
        del loop
        with lock:
            closing.start()
            closing.join(timeout=10)
        return closing.is_alive()

    def drop(loops: list[EventLoop]) -> None:
        async def inside() -> None:
            loops.clear()

        asyncio.run(inside())

    assert not asyncio.run(around())
