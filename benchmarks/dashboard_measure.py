"""Measure `keel serve` on one run in Chromium: time until the page is readable, and smoothness of scrolling."""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from keel.web.dashboard.folder import run_name

CHROMIUM = "/usr/bin/chromium"
# The page is watched from inside: what a person would see, not what a request took.
FIRST = """() => new Promise((resolve) => {
  const found = {};
  const look = () => {
    if (!found.curve && document.querySelector(".plot path.line")) found.curve = performance.now();
    if (!found.row && document.querySelector(".item:not(.waiting) .item-response")) found.row = performance.now();
    found.curve && found.row ? resolve(found) : requestAnimationFrame(look);
  };
  look();
})"""
SCROLL = """([perFrame, seconds]) => new Promise((resolve) => {
  const list = document.getElementById("list");
  const [times, empty, began] = [[], [], performance.now()];
  let last = began;
  const frame = (now) => {
    times.push(now - last);
    last = now;
    list.scrollTop += perFrame;
    empty.push(document.querySelectorAll(".item.waiting:not([hidden])").length);
    now - began < 1000 * seconds ? requestAnimationFrame(frame) : resolve({ times: times.slice(2), empty });
  };
  requestAnimationFrame(frame);
})"""
JUMP = """(share) => new Promise((resolve) => {
  const list = document.getElementById("list");
  const began = performance.now();
  list.scrollTop = share * list.scrollHeight;
  const look = () => {
    const items = [...document.querySelectorAll(".item:not([hidden])")];
    items.length && items.every((item) => !item.classList.contains("waiting")) && performance.now() - began > 30
      ? resolve(performance.now() - began) : requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
})"""


@contextmanager
def serving(folder: Path, port: int) -> Iterator[str]:
    """Run `keel serve` in a separate process, and yield its private link."""
    command = [sys.executable, "-m", "keel.cli.main", "serve", str(folder), f"--port={port}", "--browser=false"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    link = re.search(r"http\S+", server.stdout.readline())
    assert link is not None
    time.sleep(0.5)
    try:
        yield link[0]
    finally:
        server.terminate()
        server.wait()


def measure(run: Path, port: int = 8765) -> None:
    root = run.parent.resolve()
    with serving(root, port) as link, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.request.get(link)  # the cookie alone: nothing of the run has been read yet
        page = context.new_page()
        page.goto(f"{link[: link.index('/enter')]}/run/{run_name(run.resolve(), root)}", wait_until="commit")
        first = page.evaluate(FIRST)
        print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(f"first curve after {first['curve'] / 1000:.2f} s, first answers after {first['row'] / 1000:.2f} s")
        began = time.monotonic()
        page.locator("#matched:not(:has-text('read'))").wait_for(timeout=120_000)
        print(f"all answers {first['row'] / 1000 + time.monotonic() - began:.1f} s after the start")
        scroll(page)
        search(page)
        browser.close()


def scroll(page: Page) -> None:
    page.locator("#list").scroll_into_view_if_needed()
    for per_frame in (0, 40, 400):  # 0 says what this machine makes of a page at rest
        found = page.evaluate(SCROLL, [per_frame, 4])
        times, empty = sorted(found["times"]), found["empty"]
        p95 = times[int(0.95 * len(times))]
        print(
            f"scrolling {per_frame} px a frame: {len(times)} frames, median {statistics.median(times):.1f} ms, "
            f"p95 {p95:.1f} ms, longest {times[-1]:.0f} ms; frames with a row still empty: {sum(map(bool, empty))}"
        )
    jumps = sorted(page.evaluate(JUMP, share) for share in (0.9, 0.1, 0.7, 0.3, 0.99, 0.5, 0.05, 0.8))
    print(
        f"jump anywhere until all rows are there: median {statistics.median(jumps):.0f} ms, longest {jumps[-1]:.0f} ms"
    )


def search(page: Page) -> None:
    for what, action in {
        "sort by score": lambda: page.locator("#list-head [data-sort=score]").click(),
        "search a text": lambda: page.locator("#filters [name=text]").fill("lamp chair"),
    }.items():
        began = time.monotonic()
        action()
        page.locator("#list-head [data-sort=score][aria-pressed=true]").wait_for()
        if "text" in what:
            page.locator("#matched:has-text(' of ')").wait_for()
            first = time.monotonic() - began
            page.locator("#matched:has-text(' of '):not(:has-text('searched'))").wait_for(timeout=60_000)
            print(f"{what}: first found after {first:.2f} s, all after {time.monotonic() - began:.2f} s")
        else:
            print(f"{what}: {time.monotonic() - began:.2f} s")
