"""A study under test, and what people do in its pages. Shown answers are known by their text, never by their place."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request

from keel.cli.rank import run as keel_rank

KEEL_RANK = [sys.executable, "-c", "import sys; from keel.cli.main import main; sys.exit(main())", "rank"]
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@dataclass
class Study:
    browser: Browser
    store: Path
    process: "subprocess.Popen[str]"
    links: dict[str, str]  # by name; the owner's is under "owner"
    contexts: list[BrowserContext] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)  # what no page may ever do
    posts: list[Request] = field(default_factory=list)

    def visit(self, name: str, **options: Any) -> Page:
        """The page behind a private link, in a browser profile of its own. Nothing moves there but what is tested."""
        settings = {"viewport": WIDE, "reduced_motion": "reduce", **options}
        context = self.browser.new_context(**settings)
        context.set_default_timeout(60_000)  # a commit waits for the disk, which other tests may keep busy
        self.contexts.append(context)
        page = context.new_page()
        page.on("request", self._on_request)
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("console", self._on_console)
        page.goto(self.links[name])
        return page

    def rank(self, name: str, **options: Any) -> Page:
        """The first item that lies before a rater."""
        page = self.visit(name, **options)
        enter(page)
        return page

    def _on_request(self, request: Request) -> None:
        base = re.match(r"http://[^/]+/", self.links["owner"])
        if not base or not request.url.startswith(base.group()):
            self.complaints.append(f"request: {request.url}")
        if request.method == "POST":
            self.posts.append(request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            self.complaints.append(message.text)

    def kill(self) -> None:
        """As kill -9, or a power cut, does."""
        self.process.kill()
        self.process.communicate()

    def revive(self) -> None:
        self.process, links = serve(self.store.with_name("rank.yaml"))
        assert links == self.links

    def stop(self) -> None:
        for context in self.contexts:
            context.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=20)

    def export(self) -> list[dict[str, Any]]:
        """The rows of `keel rank --export`, while the server is at work."""
        out = self.store.with_name("out.jsonl")
        keel_rank(["--store", str(self.store), "--export", str(out)])
        return [json.loads(line) for line in out.read_text().splitlines()]

    def figures(self) -> dict[str, Any]:
        """What `keel rank --stats` reports."""
        return keel_rank(["--store", str(self.store), "--stats"])


@contextmanager
def studying(browser: Browser, folder: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> Iterator[Study]:
    """`keel rank` on these rows, until the end of the block. Then all pages must have behaved."""
    answers, store, recipe = folder / "answers.jsonl", folder / "ratings.db", folder / "rank.yaml"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fixed = {"answers": str(answers), "store": str(store), "port": port, "browser": False}
    recipe.write_text(yaml.safe_dump(fixed | settings))
    study = Study(browser, store, *serve(recipe))
    try:
        yield study
    finally:
        study.stop()
    assert study.complaints == [], "a page asked elsewhere, opened a dialog or failed"


def serve(recipe: Path) -> tuple["subprocess.Popen[str]", dict[str, str]]:
    """A server, and the links that it printed."""
    process = subprocess.Popen([*KEEL_RANK, str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    links: dict[str, str] = {}
    assert process.stdout is not None
    while "owner" not in links:
        line = process.stdout.readline()
        if line.startswith("keel: error") or not line:
            pytest.fail(line + process.communicate()[0])
        name, _, link = line.strip().rpartition(": ")
        if link.startswith("http"):
            links[name] = link
    return process, links


def enter(page: Page) -> None:
    """From the welcome to what it leads to."""
    with page.expect_navigation():
        page.get_by_role("link", name="Begin").click()


def prompt(page: Page) -> str:
    return page.locator(".prompt .text").last.inner_text()


def shown(page: Page) -> list[str]:
    """The texts of the answers in the order of their numbers."""
    cards = page.locator(".card").evaluate_all(
        "cards => cards.map(card => [Number(card.dataset.response), card.querySelector('.text').textContent])"
    )
    return [text for _, text in sorted(cards)]


def number(page: Page, text: str) -> str:
    """The key of the answer with this text."""
    return str(shown(page).index(text) + 1)


def card(page: Page, text: str) -> Locator:
    return page.locator(".card").filter(has=page.get_by_text(text, exact=True))


def button(page: Page, text: str, name: str) -> Locator:
    """A button on the card of an answer, by the beginning of its name for a screen reader."""
    return card(page, text).get_by_role("button", name=re.compile(f"^{name}"))


def ranking(page: Page) -> list[list[str]]:
    """What stands under "Best to worst": the texts of each place."""
    cards: list[list[str]] = page.locator("#ranked .card").evaluate_all(
        "cards => cards.map(card => [card.dataset.place, card.querySelector('.text').textContent])"
    )
    return [sorted(text for _, text in place) for _, place in groupby(cards, key=lambda card: card[0])]


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def place(page: Page, *texts: str) -> None:
    """By number keys, one after the other."""
    answers = shown(page)
    press(page, *(str(answers.index(text) + 1) for text in texts))


def go(page: Page, key: str) -> None:
    """Press a key that leads to the next page, and wait for it."""
    with page.expect_navigation():
        press(page, key)


def middle(target: Locator, at: float = 0.5) -> tuple[float, float]:
    """A point of an element, `at` of its height."""
    box = target.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + at * box["height"]


def drag(page: Page, text: str, target: Locator, at: float = 0.5) -> None:
    """Lift a card by its head, and drop it on a part of another element."""
    head = card(page, text).locator(".name")
    head.scroll_into_view_if_needed()
    x, y = middle(head)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 9, y)  # lifted: the page makes room
    page.mouse.move(*middle(target, at), steps=3)
    page.mouse.up()
