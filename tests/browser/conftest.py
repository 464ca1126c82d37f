"""A browser, and studies that it visits: each is a real `keel rank` in a process of its own."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from .study import Study, studying


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Per module: while Playwright runs, its event loop keeps other tests of this process from having one."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("the tests of the pages need a browser: apt-get install chromium")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=chromium) as browser:
        yield browser


@pytest.fixture
def start(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Study]]:
    """start(rows, setting=value...) begins a study, which ends with the test."""
    with ExitStack() as studies:
        yield lambda rows, **settings: studies.enter_context(studying(browser, tmp_path, rows, **settings))
