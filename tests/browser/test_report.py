"""The report in a real browser, from a file and without a network: plots, switches, schemes, paper, hostile texts."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from keel.report.reward_report import write_reward_report
from keel.report.run_report import write_report

from ..diagnosis.pages import hostile_run
from ..diagnosis.written import ANSWERS, settings, write_run
from ..report.test_reward_report import pair, run_with
from .accessibility import violations

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
Open = Callable[..., Page]


@pytest.fixture
def show(browser: Browser) -> Iterator[Open]:
    """show(folders, option=value...) opens their report, or `page`. In the end none may have asked or failed."""
    complaints: list[str] = []
    with ExitStack() as contexts:

        def opened(*folders: Path, page: Path | None = None, **options: Any) -> Page:
            target = page or write_report([str(folder) for folder in folders])[0]
            context = browser.new_context(**{"viewport": WIDE, "offline": True, "reduced_motion": "reduce", **options})
            contexts.callback(context.close)
            context.set_default_timeout(60_000)
            tab = context.new_page()
            tab.on("request", lambda asked: complaints.append(asked.url) if asked.url != target.as_uri() else None)
            tab.on("console", lambda said: complaints.append(said.text))
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on("dialog", lambda dialog: complaints.append(dialog.message))
            tab.goto(target.as_uri())
            return tab

        yield opened
    assert complaints == []


def drawn(page: Page, kind: str) -> int:
    """How many lines the first plot of this kind has, once it is in sight."""
    plot = page.locator(f'[data-plot="{kind}"]').first
    plot.scroll_into_view_if_needed()
    plot.locator(".js-line").first.wait_for(state="attached")
    return plot.locator(".js-line").count()


def stroke(page: Page) -> str:
    return page.locator('[data-plot="curve"] .js-line').first.evaluate("line => getComputedStyle(line).stroke")


def too_wide(page: Page) -> int:
    """By how many pixels the page can be scrolled sideways."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.mark.slow
def test_every_open_plot_is_drawn(show: Open, tmp_path: Path):
    page = show(write_run(tmp_path / "small", answers=ANSWERS * 4))
    page.wait_for_function(
        """() => {
            const open = [...document.querySelectorAll('.plot')].filter(plot => plot.offsetParent);
            return open.length === 14 && open.every(plot => plot.querySelector('.js-line'));
        }"""
    )
    assert drawn(page, "curve") == 1
    assert drawn(page, "frontier") == 1
    assert drawn(page, "spread") == 5  # two bands of two borders, and the median
    assert page.locator('[data-plot="frontier"]').nth(1).get_by_text("highest").count() == 1
    assert page.get_by_text("KL to the reference, nats").count() >= 2
    page.get_by_role("button", name="√KL").click()
    page.locator('[data-plot="frontier"]').first.get_by_text("√KL to the reference").wait_for()
    last = page.evaluate("""document.querySelector('[data-plot="frontier"]').data[0].x.at(-1)""")
    assert last == pytest.approx(6.33333**0.5)


def test_groups_open_and_draw(show: Open, tmp_path: Path):
    page = show(write_run(tmp_path / "small"))
    other = page.locator(".group").last
    assert other.locator("summary").inner_text() == "Other metrics my/figure"
    assert not other.locator(".plot").is_visible()
    page.get_by_role("button", name="Open all groups").click()
    other.locator(".plot").scroll_into_view_if_needed()
    other.locator(".js-line").wait_for(state="attached")


def test_the_token_view_switches_answer_and_channel(show: Open, tmp_path: Path):
    page = show(write_run(tmp_path / "small"))
    view, channels = page.locator("#token-view"), page.locator("#channels button")
    assert channels.all_inner_texts() == ["reward", "kl", "value", "advantage", "logprob"]
    pieces = view.get_by_role("option")
    assert pieces.all_inner_texts() == [" I ", "will look. who knows."]
    page.get_by_role("button", name="advantage").click()
    assert [piece.get_attribute("aria-label") for piece in pieces.all()] == [
        "I: advantage 0.5",
        "will look. who knows.: advantage \N{MINUS SIGN}0.75",
    ]
    page.keyboard.press("Shift+Tab")  # to "value", and on by the keyboard alone
    page.keyboard.press("Enter")
    assert page.locator("#channels [aria-pressed=true]").inner_text() == "value"
    assert page.evaluate("document.activeElement.dataset.channel") == "value"
    page.get_by_role("button", name="worst").click()
    assert pieces.all_inner_texts() == [" wh", "o knows."]
    assert page.locator("[data-about]:visible").inner_text().startswith("Where is my drill?")
    assert page.locator("#channels [aria-pressed=true]").inner_text() == "value"  # the channel stays


@pytest.mark.slow
def test_the_page_follows_the_scheme_and_is_light_on_paper(show: Open, tmp_path: Path):
    page = show(write_run(tmp_path / "small"), color_scheme="dark")
    drawn(page, "curve")
    dark = stroke(page)
    page.emulate_media(color_scheme="light")
    page.wait_for_function("before => getComputedStyle(document.querySelector('.js-line')).stroke !== before", arg=dark)
    light = stroke(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "before => getComputedStyle(document.querySelector('.js-line')).stroke !== before", arg=light
    )
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert stroke(page) == light
    plots = page.locator(".plot").count()
    assert page.locator(".plot:has(.js-line)").count() == plots  # also those that were never in sight
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert stroke(page) == dark


def test_several_runs_share_their_plots(show: Open, tmp_path: Path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", settings(algorithm__kl_coef=0.2))]
    page = show(*runs, viewport=PHONE, has_touch=True)
    assert drawn(page, "curve") == 2
    assert drawn(page, "frontier") == 2
    assert too_wide(page) == 0
    assert page.locator(".legend").inner_text().split() == ["a", "b"]


def test_hostile_texts_do_nothing(show: Open, tmp_path: Path):
    folder = hostile_run(tmp_path / "<img src=x onerror=alert(3)><b>bold")
    page = show(folder, write_run(tmp_path / "tame"), viewport=PHONE)
    page.get_by_role("button", name="Open all groups").click()
    assert drawn(page, "curve") == 2
    plot = page.locator('[data-plot="curve"]').first
    surface = plot.locator(".nsewdrag")
    surface.hover()
    surface.hover(position={"x": 60, "y": 60})
    plot.locator(".hoverlayer text").first.wait_for()
    shown = " ".join(plot.locator(".hoverlayer text").all_text_contents())
    assert re.search("<img src=x onerror", shown)  # as it is written, or cut short, and nothing made of it
    assert plot.locator(".hoverlayer tspan[style*=bold]").count() == 0
    assert page.locator("img").count() == 0
    for button in page.locator("[data-response]").all():
        button.click()
    assert too_wide(page) == 0


def test_axe_finds_nothing(show: Open, tmp_path: Path):
    one = show(write_run(tmp_path / "one", answers=ANSWERS * 4))
    one.get_by_role("button", name="Open all groups").click()
    several = show(write_run(tmp_path / "a"), hostile_run(tmp_path / "b"))
    assert [violations(one), violations(several)] == [[], []]


def test_axe_finds_nothing_in_the_report_of_a_reward_model(show: Open, tmp_path: Path):
    rankings = [pair("good" * (1 + i % 3), "bad", prompt=f"Question {i}?", rater=f"r{i % 2}") for i in range(50)]
    target = write_reward_report(str(run_with(tmp_path, rankings, [[i % 3, 1.0] for i in range(50)])))
    assert target is not None
    assert violations(show(page=target)) == []
