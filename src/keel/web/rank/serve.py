"""Serving the pages until enough is ranked, or a signal comes."""

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
from keel.web.rank.app import links, rank_app

MAX_CONNECTIONS = 512
IDLE_SECONDS = 2.0  # without a ranking, after which the store is left in its one file


def serve_ranking(store: Store, settings: RankConfig, until: Callable[[], bool] | None = None) -> None:
    """Print each private link and serve the pages until `until` says so (asked every second) or a signal comes.

    Instructions and tags are those of the settings or, without any, those that the study had before. With
    `settings.browser`, and on a terminal, the first rater's page opens. Raises ConfigError for an address that
    cannot be had, or instructions that cannot be read.
    """
    instructions = store.remember("instructions", read_instructions(settings.instructions))
    settings = settings.model_copy(update={"tags": store.remember("tags", settings.tags or None, [])})
    server = prompt_server(rank_app(store, settings, instructions), MAX_CONNECTIONS)

    async def look() -> None:
        with suppress(StoreError):  # whoever ranks next will be told
            await run_in_threadpool(store.rest, IDLE_SECONDS)
        server.should_exit = server.should_exit or (until is not None and await run_in_threadpool(until))

    server.config.timeout_notify, server.config.callback_notify = 1, look
    with listening(settings.host, settings.port) as place:
        private = links(store, settings)
        for name, link in private.items():
            print(f"{name or 'owner'}: {link}", flush=True)
        if settings.browser:
            open_link(next(iter(private.values())))
        with suppress(Interrupted, KeyboardInterrupt):
            server.run(sockets=[place])


def open_link(link: str) -> None:
    """In a browser, if there is a terminal, and so a person."""
    if sys.stdout.isatty():
        # in a thread of its own, for a browser in the terminal comes back only when it is closed
        threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()


def check_rank_settings(settings: RankConfig) -> None:
    """Raises ConfigError for what `serve_ranking` would stumble over, before a store is touched."""
    check_reach(settings.host, settings.public)
    read_instructions(settings.instructions)
    listening(settings.host, settings.port).close()


def read_instructions(path: str | None) -> str | None:
    """The text that raters see before they begin. Raises ConfigError."""
    if path is None:
        return None
    try:
        return read_regular(path).decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "instructions", "give a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", "instructions", "give a text file") from error
