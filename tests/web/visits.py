"""A study with its pages, and raters and owners who visit them as a browser would."""

import html
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.testclient import TestClient

from keel.config import RankConfig
from keel.data.items import UnrankedResponses
from keel.ranking.store import Store
from keel.server.limits import prompt_server
from keel.web.rank.app import private_links, rank_app

PORT = 8642
ADDRESS = f"http://127.0.0.1:{PORT}"
ROWS = [UnrankedResponses(f"question {i}", tuple(f"answer {i}{letter}" for letter in "abc")) for i in range(4)]


@dataclass(frozen=True)
class Loaded:
    """What a rater's page holds."""

    deal: str
    csrf: str
    previous: Any
    answers: list[str]


class Visitor:
    """A browser that has followed a private link."""

    def __init__(self, client: httpx.Client, link: str) -> None:
        self.client, self.link = client, link
        self.address = link[: link.index("/enter")]

    def enter(self) -> httpx.Response:
        return self.client.get(self.link)

    def load(self) -> Loaded | None:
        """The item on the rater's page; None on the last page."""
        answer = self.client.get(f"{self.address}/rank")
        assert answer.status_code == 200, answer.text
        found = re.search(r'data-deal="(.*?)" data-csrf="(.*?)" data-previous=\'(.*?)\'', answer.text)
        texts = re.findall(r'<article.*?<div class="text".*?>(.*?)</div>', answer.text, re.DOTALL)
        return found and Loaded(
            found[1], found[2], json.loads(html.unescape(found[3])), list(map(html.unescape, texts))
        )

    def post(self, path: str, body: Any, token: str, **headers: str) -> httpx.Response:
        given = {"Origin": self.address, "X-Keel-Token": token, **headers}
        return self.client.post(f"{self.address}{path}", json=body, headers=given)

    def say(self, page: Loaded, ranks: Sequence[int | None] | None, **more: Any) -> httpx.Response:
        body = {"deal": page.deal, "ranks": ranks, "comment": "", "tags": [], "seconds": 1.5, **more}
        return self.post("/judgements", body, page.csrf)

    def undo(self, page: Loaded) -> httpx.Response:
        return self.post("/undo", {}, page.csrf)


@dataclass
class Study:
    """A store and its pages, without a socket."""

    store: Store
    settings: RankConfig
    app: Any

    def browser(self) -> TestClient:
        return TestClient(self.app, ADDRESS, raise_server_exceptions=True, follow_redirects=False)

    def visitor(self, name: str) -> Visitor:
        """A rater by name, or the owner by "", who has just entered."""
        visitor = Visitor(self.browser(), private_links(self.store, self.settings)[name])
        assert visitor.enter().status_code == 200
        return visitor


def study(
    folder: Path, rows: Sequence[UnrankedResponses] = ROWS, instructions: str | None = None, **settings: Any
) -> Study:
    config = RankConfig(**{"store": str(folder / "ratings.db"), "raters": ["anna", "ben"], "port": PORT, **settings})
    store = Store.open(config.store, config.overlap, config.seed)
    store.add_items(rows)
    store.add_raters(config.raters)
    return Study(store, config, rank_app(store, config, instructions))


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Study]:
    """The pages at a free port, served by a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        there = study(folder, port=place.getsockname()[1], **settings)
        server = prompt_server(there.app, 512)
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        yield there
        server.should_exit = True
        thread.join(10)


def raw(port: int, request: bytes, seconds: float = 10.0) -> bytes:
    """The whole answer to these bytes."""
    with socket.create_connection(("127.0.0.1", port), seconds) as connection:
        connection.sendall(request)
        answer = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
        return answer


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as place:
        port: int = place.getsockname()[1]
        return port


@dataclass
class Process:
    """`keel rank` as a user starts it."""

    child: subprocess.Popen[str]
    links: dict[str, str]

    @classmethod
    def start(cls, store: Path, port: int, *arguments: str) -> "Process":
        """Returns when it answers."""
        command = [sys.executable, "-m", "keel.cli.main", "rank", *arguments, f"--store={store}", f"--port={port}"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        found: dict[str, str] = {}
        while "owner" not in found:
            line = child.stdout.readline()
            assert line, child.communicate()
            name, _, link = line.strip().partition(": ")
            found[name] = link
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return cls(child, found)
            except OSError:
                time.sleep(0.02)
        raise AssertionError("it does not listen")

    def kill(self) -> None:
        self.child.kill()
        self.child.communicate()

    def stop(self) -> tuple[int, str, str]:
        """Ctrl-C: exit code, and what was said."""
        self.child.send_signal(signal.SIGINT)
        out, err = self.child.communicate(timeout=30)
        return self.child.returncode, out, err
