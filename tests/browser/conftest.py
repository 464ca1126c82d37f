"""A browser, and studies that it visits: each is a real `keel rank` in a process of its own."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Playwright, sync_playwright

from .study import Study, studying

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = "the tests of the pages need a browser: run make browser"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Per module: while Playwright runs, its event loop keeps other tests of this process from having one."""
    with sync_playwright() as playwright:
        chromium = find_chromium(playwright)
        if chromium is None:
            (pytest.fail if os.environ.get("KEEL_NEEDS_BROWSER") else pytest.skip)(HOW)
        with playwright.chromium.launch(executable_path=chromium) as browser:
            yield browser


def find_chromium(playwright: Playwright) -> str | None:
    """The system's, or the one that playwright has installed for this user."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    downloaded = playwright.chromium.executable_path
    return found or (downloaded if Path(downloaded).is_file() else None)


@pytest.fixture
def start(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Study]]:
    """start(rows, setting=value...) begins a study, which ends with the test."""
    with ExitStack() as studies:
        yield lambda rows, **settings: studies.enter_context(studying(browser, tmp_path, rows, **settings))
