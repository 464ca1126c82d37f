"""The server of `keel rank`, which runs until a condition holds or a signal arrives."""

import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress

from starlette.concurrency import run_in_threadpool

from keel.config import RankConfig
from keel.errors import ConfigError, Interrupted
from keel.files import read_regular
from keel.ranking.database import StoreError
from keel.ranking.store import Store
from keel.server.limits import check_reach, listening, prompt_server
from keel.web.rank.app import private_links, rank_app

MAX_CONNECTIONS = 512
IDLE_SECONDS = 2.0  # without a change, after which the log is written into the store's file


def serve_ranking(store: Store, settings: RankConfig, until: Callable[[], bool] | None = None) -> None:
    """Print the private links and serve the pages until a condition holds or a signal arrives.

    Instructions and tags that the settings leave out are those that the store remembers. On a terminal, and with
    `settings.browser`, the first rater's page is opened.

    Args:
        store: The study.
        settings: The settings of `keel rank`.
        until: Called every second; the server stops when it returns True.

    Raises:
        ConfigError: The address cannot be used, or the instructions cannot be read.
    """
    instructions = store.remember("instructions", read_instructions(settings.instructions))
    settings = settings.model_copy(update={"tags": store.remember("tags", settings.tags or None, [])})
    server = prompt_server(rank_app(store, settings, instructions), MAX_CONNECTIONS)

    async def check_every_second() -> None:
        with suppress(StoreError):  # the next request of a rater reports it
            await run_in_threadpool(store.rest, IDLE_SECONDS)
        server.should_exit = server.should_exit or (until is not None and await run_in_threadpool(until))

    server.config.timeout_notify, server.config.callback_notify = 1, check_every_second
    with listening(settings.host, settings.port) as listener:
        links = private_links(store, settings)
        for name, link in links.items():
            print(f"{name or 'owner'}: {link}", flush=True)
        if settings.browser:
            open_link(next(iter(links.values())))
        with suppress(Interrupted, KeyboardInterrupt):
            server.run(sockets=[listener])


def open_link(link: str) -> None:
    """Open a link in the browser if the output is a terminal, which means that a person is watching."""
    if sys.stdout.isatty():
        # In a thread, because webbrowser.open() of a text browser returns only when the browser is closed.
        threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()


def check_rank_settings(settings: RankConfig) -> None:
    """Check the settings that `serve_ranking` needs, before a store is opened. Raises ConfigError."""
    check_reach(settings.host, settings.public)
    read_instructions(settings.instructions)
    listening(settings.host, settings.port).close()


def read_instructions(path: str | None) -> str | None:
    """Read the text that raters see before they begin. Raises ConfigError."""
    if path is None:
        return None
    try:
        return read_regular(path).decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", "instructions", "name a text file in UTF-8"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", "instructions", "name a text file in UTF-8") from error
