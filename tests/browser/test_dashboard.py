"""The pages of `keel serve` in a real browser: they follow runs, find answers, and show what was written as text."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from keel.data.items import read_unranked_responses
from keel.diagnosis.doctor import diagnose
from keel.run.metrics_log import truncate_after
from keel.run.read.run import read_run
from keel.run.rollout_log import RolloutLog

from ..web.board import Process, WrittenRun, answer
from .accessibility import violations
from .test_pages import PAYLOADS

pytestmark = pytest.mark.slow

expect.set_options(timeout=30_000)  # other tests may be at work on this machine
MINUS = "\N{MINUS SIGN}"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


class Visits:
    """Browser windows at one dashboard, and everything that none of its pages may ever do."""

    def __init__(self, browser: Browser, server: Process) -> None:
        self.browser, self.server = browser, server
        self.complaints: list[str] = []
        self.contexts: list[BrowserContext] = []

    def page(self, **options: Any) -> Page:
        """The list of runs, in a browser profile of its own."""
        context = self.browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
        context.set_default_timeout(60_000)
        self.contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: self.look(request.url, request.method))
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on(
            "console", lambda message: message.type in ("error", "warning") and self.complaints.append(message.text)
        )
        page.goto(self.server.link)
        return page

    def run(self, run: WrittenRun, **options: Any) -> Page:
        page = self.page(**options)
        page.goto(f"{self.server.address}/run/{run.name}")
        return page

    def look(self, url: str, method: str) -> None:
        if not url.startswith(f"{self.server.address}/") or method != "GET":
            self.complaints.append(f"{method} {url}")


@pytest.fixture
def visits(browser: Browser, tmp_path: Path) -> Iterator[Callable[[], Visits]]:
    """visits() begins to serve `tmp_path/runs`; at the end every page must have behaved."""
    opened: list[Visits] = []

    def begin() -> Visits:
        opened.append(Visits(browser, Process.start(tmp_path / "runs")))
        return opened[0]

    yield begin
    for each in opened:
        for context in each.contexts:
            context.close()
        code, _, err = each.server.stop()
        assert (code, err.strip()) == (0, "keel: SIGINT: stopping")
        assert each.complaints == []


@pytest.fixture
def run(tmp_path: Path) -> WrittenRun:
    return WrittenRun(tmp_path / "runs" / "first", steps=40).go_on(6)


def chart(page: Page, figure: str) -> Any:
    return page.locator(f"[id='figure-{figure}'] .plot")


def rows(page: Page) -> list[str]:
    """The answers on the screen, from above."""
    found: list[list[Any]] = page.locator(".item:not([hidden]):not(.waiting)").evaluate_all(
        "items => items.map(i => [Number(i.dataset.number), i.querySelector('.item-response span').textContent])"
    )
    return [text for _, text in sorted(found)]


def first_row(page: Page) -> Any:
    return page.locator(".item[data-number='0'] .item-response")


# ---- the list of runs


def test_the_list_follows_the_runs(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    page = visits().page()
    row = page.locator("#runs tr").filter(has_text="first")
    expect(row.locator(".standing")).to_have_text("running")
    expect(row.locator(".progress-cell")).to_contain_text("6 / 40")
    run.go_on(3)
    expect(row.locator(".progress-cell")).to_contain_text("9 / 40")
    expect(row.locator(".score-figure")).to_have_text("0.9")
    run.end("failed", "RewardError: <no> answer")
    expect(row.locator(".standing")).to_have_text("failed")
    expect(row.locator(".why")).to_have_text("RewardError: <no> answer")
    WrittenRun(run.path.with_name("second")).go_on(2)
    expect(page.locator("#runs tr")).to_have_count(2)
    assert page.url.endswith("/")  # the token of the link is not in the address any more


def test_runs_are_filtered_and_sorted(tmp_path: Path, visits: Callable[[], Visits]) -> None:
    for steps, name in ((2, "alpha"), (9, "beta"), (5, "gamma")):
        WrittenRun(tmp_path / "runs" / "world" / name).go_on(steps).end("finished" if name != "beta" else "stopped")
    page = visits().page()

    def shown() -> list[str]:
        return [title.partition("/")[2] for title in page.locator(".run-link").all_inner_texts()]

    expect(page.locator("#runs tr")).to_have_count(3)
    page.locator("th[data-sort=score] button").click()
    assert shown() == ["beta", "gamma", "alpha"]
    page.locator("th[data-sort=score] button").click()
    assert shown() == ["alpha", "gamma", "beta"]
    expect(page.locator("th[data-sort=score]")).to_have_attribute("aria-sort", "ascending")
    page.locator("#filter").fill("world finished")
    expect(page.locator("#count")).to_have_text("2 of 3 runs")
    page.reload()
    expect(page.locator("#runs tr")).to_have_count(2)
    assert shown() == ["alpha", "gamma"]
    page.locator(".run-link").first.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("world/alpha")
    page.go_back()
    expect(page.locator("#filter")).to_have_value("world finished")


# ---- one run, live


def test_curves_and_answers_follow_a_run(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    page = visits().run(run)
    expect(chart(page, "objective/scores")).to_have_attribute("aria-label", "Score: 0.6 at step 6")
    expect(first_row(page)).to_have_text("we send item 27.truncated", use_inner_text=False)
    run.go_on(2)
    expect(chart(page, "objective/scores")).to_have_attribute("aria-label", "Score: 0.8 at step 8")
    expect(first_row(page)).to_contain_text("item 35")
    truncate_after(run.path / "metrics.jsonl", 3)
    truncate_after(run.path / "rollouts.jsonl", 3)
    run.done = 3
    expect(chart(page, "objective/scores")).to_have_attribute("aria-label", "Score: 0.3 at step 3")
    expect(first_row(page)).to_contain_text("item 15")
    run.end("stopped", "Interrupted: SIGTERM")
    expect(page.locator("#state .standing")).to_have_text("stopped")
    expect(page.locator("#trouble")).to_have_text("Interrupted: SIGTERM")


def test_who_reads_is_not_pushed_about_by_what_comes(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    run.go_on(20)
    page = visits().run(run)
    expect(page.locator("#matched")).to_have_text("104 responses")
    page.locator("#list").evaluate("list => { list.scrollTop = 1000; }")
    expect(first_row(page)).to_have_count(0)  # the rows that were scrolled to have been drawn
    seen = rows(page)
    run.go_on(1)
    expect(page.locator("#newer")).to_have_text("4 newer responses: show")
    assert rows(page) == seen
    page.locator("#newer").click()
    expect(page.locator("#matched")).to_have_text("108 responses")
    expect(first_row(page)).to_contain_text("item 111")


def test_a_torn_file_is_called_incomplete(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    run.end()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "object')
    page = visits().page()
    expect(page.locator("#runs .badge-incomplete")).to_have_text("incomplete")
    page.locator(".run-link").click()
    expect(page.locator("#trouble")).to_have_text("the last line of metrics.jsonl is incomplete")
    expect(chart(page, "objective/scores")).to_have_attribute("aria-label", "Score: 0.6 at step 6")


def test_a_gap_is_a_gap(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    run.go_on(1, **{"objective/scores": float("nan")}).go_on(2)
    page = visits().run(run)
    line = chart(page, "objective/scores").locator("path.line")
    expect(line).to_have_attribute("d", re.compile("^M[^M]+M[^M]+$"))  # two pieces


def test_findings_lead_to_their_curves(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    run.go_on(10, **{"objective/kl": 500.0, "policy/entropy": 0.0})
    page = visits().run(run)
    finding = page.locator(".finding-card").first
    expect(finding).to_be_visible()
    expect(finding).to_contain_text(str(finding.get_attribute("data-name")))
    if finding.get_attribute("open") is None:
        finding.locator("summary").click()
    expect(finding.locator(".change").first).to_contain_text("Try")
    link = finding.locator(".evidence-figure").first
    figure = link.text_content()
    link.click()
    expect(chart(page, str(figure))).to_be_in_viewport()


def test_runs_are_filtered_by_the_name_of_any_finding(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    run.go_on(10, **{"objective/kl": 500.0, "policy/entropy": 0.0})
    found = diagnose(read_run(run.path)).findings
    assert len(found) > 1
    page = visits().page()
    box = page.get_by_label("Filter the runs")
    expect(page.locator("#runs .verdict-cell")).to_contain_text(found[0].title)
    for finding in found:
        box.fill(finding.name)
        expect(page.locator("#runs tr")).to_have_count(1)
    box.fill("no-such-finding")
    expect(page.locator("#runs tr")).to_have_count(0)


def test_all_curves_show_the_step_that_is_pointed_at(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    page = visits().run(run)
    plot = chart(page, "objective/scores")
    expect(plot).to_have_attribute("aria-label", "Score: 0.6 at step 6")
    plot.focus()
    page.keyboard.press("Home")
    expect(page.locator("[id='figure-objective/scores'] .chart-value")).to_have_text("0.1step 1")
    page.keyboard.press("ArrowRight")
    expect(page.locator("[id='figure-objective/kl'] .chart-value")).to_have_text("0.4step 2")
    page.keyboard.press("Escape")
    expect(page.locator("[id='figure-objective/kl'] .chart-value")).to_have_text("1.2")
    elsewhere = page.locator("[id='figure-objective/kl'] .chart-value")
    for _ in range(20):  # what comes in above may push the plot away from under the pointer
        box = plot.bounding_box()
        assert box is not None
        plot.hover(position={"x": box["width"] - 12, "y": 50})
        page.wait_for_timeout(200)
        if elsewhere.inner_text() != "1.2":
            break
    expect(elsewhere).to_have_text("1.2step 6")


# ---- answers


def test_answers_are_searched_filtered_and_sorted(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    page = visits().run(run)
    expect(page.locator("#matched")).to_have_text("24 responses")
    page.get_by_label("Search prompts and responses").fill("nobody said this")
    expect(page.locator("#list")).to_have_class(re.compile("empty"))
    page.get_by_label("Search prompts and responses").fill("QUESTION 1")
    expect(page.locator("#list")).not_to_have_class(re.compile("empty"))
    expect(page.locator("#matched")).to_have_text("8 of 24 responses")
    page.locator("#filters summary").first.click()
    page.get_by_label("Score from").fill("0.5")
    page.get_by_label("Truncated", exact=True).last.select_option("no")
    expect(page.locator("#matched")).to_have_text("3 of 24 responses")
    expect(page.locator("#filtered")).to_have_text("(2)")
    page.locator("#list-head [data-sort=score]").click()
    expect(page.locator("#list-head [data-sort=score]")).to_have_attribute("aria-pressed", "true")
    expect(first_row(page)).to_contain_text("item 4.")
    best_first = rows(page)
    page.locator("#list-head [data-sort=score]").click()
    expect(first_row(page)).not_to_contain_text("item 4.")
    assert rows(page) == best_first[::-1]
    page.reload()
    expect(page.locator("#matched")).to_have_text("3 of 24 responses")
    assert rows(page) == best_first[::-1]
    page.locator("#filters summary").first.click()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#matched")).to_have_text("24 responses")
    assert "score_from" not in page.url


def test_the_token_view_changes_its_channel(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    page = visits().run(run)
    first_row(page).click()
    pieces = page.locator("#response .keel-piece")
    expect(pieces).to_have_text([" we", " send", " item 27", ".", "</s>"], use_inner_text=False)
    tabs = page.locator("#response .tab")
    expect(tabs).to_have_text(["reward", "kl", "value", "advantage", "ratio", "logprob"])
    expect(tabs.filter(has_text="advantage")).to_have_attribute("aria-pressed", "true")
    expect(pieces.first).to_have_class(re.compile("keel-less"))
    expect(pieces.last).to_have_class(re.compile("keel-more"))
    colour = pieces.first.evaluate("piece => getComputedStyle(piece).backgroundColor")
    assert colour not in ("rgba(0, 0, 0, 0)", "transparent")
    tabs.filter(has_text="ratio").click()
    expect(pieces.nth(1)).to_have_class(re.compile("keel-more"))
    expect(pieces.nth(2)).to_have_class(re.compile("keel-less"))
    expect(pieces.nth(0)).to_have_css("background-color", re.compile(r"/ 0\)|rgba\(0, 0, 0, 0\)"))
    pieces.nth(1).hover()
    expect(page.locator("#response .keel-readout")).to_have_text(
        "sendratio 1.5reward -0.01kl 0.5value 0.2advantage -0.1logprob -1".replace("-", MINUS)
    )
    page.keyboard.press("Tab")
    pieces.first.focus()
    for key in ("ArrowRight", "ArrowRight", "End", "ArrowLeft"):
        page.keyboard.press(key)
    expect(pieces.nth(3)).to_be_focused()
    page.locator("#response").get_by_role("button", name="Close").click()
    page.locator(".item[data-number='1']").click()
    expect(tabs.filter(has_text="ratio")).to_have_attribute("aria-pressed", "true")  # as it was


def test_an_answer_has_an_address_and_the_way_back_works(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    opened = visits()
    page = opened.run(run)
    page.locator(".item[data-number='2']").click()
    title = page.locator("#response h2")
    expect(title).to_have_text("Response at step 6")
    expect(page.locator("#response .text").last).to_have_text("we send item 25.")
    address = page.url
    assert "answer=" in address
    page.go_back()
    expect(page.locator("#response")).to_be_hidden()
    page.go_forward()
    expect(title).to_be_visible()
    other = opened.page()
    other.goto(address)
    expect(other.locator("#response .text").last).to_have_text("we send item 25.")
    other.goto(address.replace("answer=", "answer=1"))
    expect(other.locator("#response .alert")).to_have_text("There is no such response (any more).")
    opened.complaints = [text for text in opened.complaints if "404" not in text]  # the browser says it too


def test_answers_that_came_in_part_are_asked_for_again(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    page = visits().run(run)
    expect(page.locator("#matched")).to_have_text("24 responses")
    page.route("**/answers.json*", lambda route: route.fulfill(status=200, body='{"total": 24, "matched"'))
    page.get_by_label("Search prompts and responses").fill("QUESTION 1")
    expect(page.locator("#freshness")).to_have_text("The reply was incomplete.")
    expect(page.locator("#matched")).to_have_text("24 responses")
    page.unroute("**/answers.json*")
    expect(page.locator("#matched")).to_have_text("8 of 24 responses")


def test_answers_by_keyboard_alone(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    page = visits().run(run)
    expect(page.locator("#matched")).to_have_text("24 responses")
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".item[data-number='1']")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#response")).to_be_hidden()
    page.keyboard.press("Enter")
    expect(page.locator("#response .text").last).to_have_text("we send item 26.")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#response .text").last).to_have_text("we send item 25.")
    page.keyboard.press("End")
    expect(page.locator("#response .text").last).to_have_text("we send item 4.")
    page.keyboard.press("Escape")
    expect(page.locator("#response")).to_be_hidden()
    expect(page.locator("#list")).to_be_focused()


def test_a_list_of_any_length_has_few_elements(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    for step in range(7, 10):
        RolloutLog(run.path / "rollouts.jsonl").log(step, [answer(step, 1000 * step + i) for i in range(1000)])
    page = visits().run(run)
    expect(page.locator("#matched")).to_have_text("3,024 responses")
    assert page.locator(".item").count() < 60
    page.locator("#list").evaluate("list => { list.scrollTop = list.scrollHeight / 2; }")
    expect(page.locator(".item[data-number='1510']")).to_contain_text("item 8489.")
    page.locator("#list").focus()
    page.keyboard.press("End")
    expect(page.locator(".item[data-number='3023']")).to_contain_text("item 4.")
    assert page.locator(".item").count() < 60
    page.keyboard.press("Home")
    expect(first_row(page)).to_contain_text("item 9999.")


def test_disputed_answers_are_downloaded_for_keel_rank(
    run: WrittenRun, visits: Callable[[], Visits], tmp_path: Path
) -> None:
    page = visits().run(run)
    page.locator("#disputed summary").click()
    expect(page.locator("#disputed code")).to_have_text("keel rank disputed.jsonl")
    page.locator("#most").fill("2")
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "disputed.jsonl"
    download.value.save_as(tmp_path / "disputed.jsonl")
    assert [len(row.responses) for row in read_unranked_responses(str(tmp_path / "disputed.jsonl"))] == [2, 2]


# ---- two runs


def test_two_runs_are_compared(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    other = WrittenRun(run.path.with_name("second"), steps=50).go_on(4, answers=0)
    changed = [answer(4, i, response=f" we sent item {i}.") for i in range(4, 16)]
    RolloutLog(other.path / "rollouts.jsonl").log(4, changed)
    page = visits().page()
    expect(page.locator("#runs tr")).to_have_count(2)
    for box in page.locator("#runs input").all():
        box.check()
    page.get_by_role("link", name="Compare two").click()
    lines = chart(page, "objective/scores").locator("path.line")
    expect(lines).to_have_count(2)
    expect(chart(page, "objective/scores")).to_have_attribute(
        "aria-label", "Score: first 0.6 at step 6; second 0.4 at step 4"
    )
    expect(chart(page, "objective/kl")).to_have_attribute(
        "aria-label", "KL to the reference: first 1.2 at step 6; second 0.8 at step 4"
    )
    expect(page.locator("#settings tbody tr")).to_have_text(["steps4050"])
    expect(page.locator("#matched")).to_have_text("3 prompts")
    page.locator(".item[data-number='0']").click()
    expect(page.locator("#pair mark")).to_have_count(2)
    texts = [re.sub(r"\s+", " ", text).strip() for text in page.locator("#pair .pair .text").all_inner_texts()]
    assert [text.split()[1] for text in texts] == ["send", "sent"]
    address = page.url
    page.locator("#pair select").first.select_option(index=1)
    expect(page.locator("#pair .pair .text").first).not_to_have_text(texts[0])
    page.go_back()
    expect(page.locator("#pair .pair .text").first).to_have_text(texts[0])
    assert page.url == address
    run.go_on(1)
    expect(chart(page, "objective/scores")).to_have_attribute(
        "aria-label", "Score: first 0.7 at step 7; second 0.4 at step 4"
    )


# ---- whatever is written, and whatever happens


def test_what_was_written_is_shown_literally(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    said = "\n".join(PAYLOADS)
    rows_ = [
        answer(7, i, prompt=said, response=text, pieces=PAYLOADS[:5], scores={text: 1.0, "b": 0.0})
        for i, text in enumerate(PAYLOADS)
    ]
    hostile = WrittenRun(run.path.with_name("<img src=x onerror=alert(1)>"), rewards=[{"function": PAYLOADS[1]}])
    hostile.go_on(3, answers=0, **{PAYLOADS[0]: 1.0, f"rewards/{PAYLOADS[1]}": 2.0}).end("failed", said)
    RolloutLog(hostile.path / "rollouts.jsonl").log(7, rows_)
    opened = visits()
    page = opened.page()
    expect(page.locator(".run-link").first).to_have_text("<img src=x onerror=alert(1)>")
    page.goto(f"{opened.server.address}/run/{hostile.name}")
    expect(page.get_by_role("heading", level=1)).to_have_text("<img src=x onerror=alert(1)>")
    expect(page.locator(".group").first).to_be_visible()
    page.locator(".group").evaluate_all("groups => groups.forEach((group) => { group.open = true; })")
    expect(page.locator(".chart h4").filter(has_text="<script>alert(1)</script>").first).to_be_visible()
    first_row(page).click()
    expect(page.locator("#response .text").first).to_have_text(said, use_inner_text=False)
    assert page.locator("#response .keel-piece").all_text_contents() == PAYLOADS[:5]
    page.goto(f"{opened.server.address}/compare?of={hostile.name}&with={run.name}")
    expect(page.locator("#settings tbody tr").first).to_be_visible()
    expect(page.locator(".side a").first).to_have_text("<img src=x onerror=alert(1)>")


def test_a_link_from_elsewhere_asks_to_load_once_more(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    opened = visits()
    cookies: Any = opened.page().context.cookies()
    page = opened.browser.new_context().new_page()
    opened.contexts.append(page.context)
    reply = page.goto(f"{opened.server.address}/run/{run.name}")
    assert reply is not None
    assert reply.status == 401
    page.context.add_cookies(cookies)  # as with a strict cookie, which comes along only from the page itself
    page.get_by_role("link", name="reload this page").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("first")


def test_a_server_that_is_gone_is_said_to_be(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    opened = visits()
    page = opened.run(run)
    expect(page.locator("#matched")).to_have_text("24 responses")
    page.context.set_offline(True)
    expect(page.locator("#freshness")).to_have_text("keel serve does not respond; trying again.")
    page.context.set_offline(False)
    expect(page.locator("#freshness")).to_have_text("")
    run.go_on(1)
    expect(chart(page, "objective/scores")).to_have_attribute("aria-label", "Score: 0.7 at step 7")
    opened.complaints = [text for text in opened.complaints if "INTERNET_DISCONNECTED" not in text]


def test_on_paper_every_curve_is_drawn(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    page = visits().run(run)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    paths = page.locator(".chart .plot").evaluate_all(
        "plots => plots.map(plot => plot.querySelectorAll('path').length)"
    )
    assert len(paths) >= 3
    assert all(paths)


def test_a_chat_is_shown_turn_by_turn(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    chat = [{"role": "user", "content": "hello"}, call, {"role": "tool", "content": "42"}]
    RolloutLog(run.path / "rollouts.jsonl").log(run.done, [answer(run.done, 1, prompt=chat)])
    page = visits().run(run)
    page.locator(".item").first.click()
    turns = page.locator(".prompt-text .turn")
    expect(turns).to_have_count(3)
    assert turns.locator("h4").all_inner_texts() == ["user", "assistant", "tool"]
    assert "look" in turns.nth(1).inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_runs_off_the_screen(run: WrittenRun, visits: Callable[[], Visits], scheme: Any) -> None:
    opened = visits()
    page = opened.page(viewport=PHONE, color_scheme=scheme)
    expect(page.locator(".run-link")).to_be_visible()
    places = ["/", f"/run/{run.name}", f"/compare?of={run.name}&with={run.name}"]
    for place in places:
        page.goto(opened.server.address + place)
        page.wait_for_load_state("networkidle") if place == "/" else expect(
            page.locator(".item").first
        ).to_be_attached()
        wide = page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], place
    page.goto(opened.server.address + places[1])
    first_row(page).click()
    expect(page.locator("#response .keel-piece").first).to_be_visible()
    box = page.locator("#response").bounding_box()
    assert box is not None
    assert box["width"] <= PHONE["width"]
    assert json.dumps(page.evaluate("() => document.documentElement.scrollWidth")) == str(PHONE["width"])


def test_axe_finds_nothing(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    opened = visits()
    page = opened.page()
    expect(page.locator(".run-link")).to_be_visible()
    found = {"list": violations(page)}
    page.goto(f"{opened.server.address}/run/{run.name}")
    expect(page.locator(".item").first).to_be_attached()
    found["run"] = violations(page)
    first_row(page).click()
    expect(page.locator("#response .keel-piece").first).to_be_visible()
    found["answer"] = violations(page)
    page.goto(f"{opened.server.address}/compare?of={run.name}&with={run.name}")
    page.locator(".item").first.click()
    found["compare"] = violations(page)
    assert found == {name: [] for name in found}


def test_some_steps_are_seen_closely(run: WrittenRun, visits: Callable[[], Visits]) -> None:
    run.go_on(1994)
    page = visits().run(run)
    score = chart(page, "objective/scores")
    expect(score).to_have_attribute("aria-label", "Score: 200 at step 2000")
    page.get_by_label("First step").fill("101")
    page.get_by_label("Last step").fill("140")
    page.keyboard.press("Enter")
    expect(score).to_have_attribute("aria-label", "Score: 14 at step 140")
    expect(score.locator("path.line")).to_have_count(1)  # no trend of so few points
    assert str(score.locator("path.line").get_attribute("d")).count("L") == 39  # each of the 40 steps
    run.go_on(1)
    expect(page.locator("#state")).to_contain_text("2001 steps")
    expect(score).to_have_attribute("aria-label", "Score: 14 at step 140")
    page.reload()
    expect(score).to_have_attribute("aria-label", "Score: 14 at step 140")
    page.get_by_role("button", name="All steps").click()
    expect(score).to_have_attribute("aria-label", "Score: 200 at step 2001")
    score.hover()  # once it stands still
    box = score.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 10, box["y"] + 60, steps=4)
    page.mouse.up()
    expect(page.get_by_label("Last step")).to_have_value("2001")
    expect(score.locator(".tick").filter(has_text="step 2001")).to_be_visible()
    assert 800 < int(page.get_by_label("First step").input_value()) < 1000
    score.dblclick()
    expect(page.get_by_label("First step")).to_have_value("")
