"""What the pages show and send: conversations, two answers, hostile text, a server that fails, the owner's figures."""

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from .study import PHONE, Study, enter, go, place, press, prompt, ranking, shown

pytestmark = pytest.mark.slow

DASH = "\N{EN DASH}"
ABC = {"prompt": "Which?", "responses": ["alpha", "beta", "gamma"]}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello to you"},
    {"role": "user", "content": "Which is it?"},
]
PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "![image](https://evil.example/track.png)",
    "</div></main><svg onload=alert(3)>",
    "{{ 7 * 7 }} {% raw %} ${7 * 7}",
    "<style>*{display:none}</style>",
    "<a href='javascript:alert(4)'>here</a> &lt;b&gt; &amp;",
    "' onfocus='alert(5)' autofocus='",
    "\u202ereversed\u202c and \x1b[31mred",
]


def test_a_chat_is_shown_as_a_conversation(start: Callable[..., Study]) -> None:
    page = start([{"prompt": CHAT, "responses": ["this", "that", "neither"]}]).rank("me")
    turns = page.locator(".turn").evaluate_all("turns => turns.map(turn => [...turn.children].map(e => e.textContent))")
    assert turns == [["System", "Be kind."], ["User", "Hello"], ["Assistant", "Hello to you"], ["User", "Which is it?"]]


def test_long_texts_are_folded(start: Callable[..., Study]) -> None:
    long = ["many words " * 5000 + letter for letter in "abc"]
    page = start([{"prompt": "p", "responses": long}]).rank("me", viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollHeight") < 5 * PHONE["height"]
    text, button = page.locator(".card .text").first, page.locator(".unfold").first
    folded = text.bounding_box()
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    unfolded = text.bounding_box()
    assert folded is not None
    assert unfolded is not None
    assert unfolded["height"] > 20 * folded["height"]


def test_code_is_set_in_a_monospaced_font(start: Callable[..., Study]) -> None:
    page = start([{"prompt": "p", "responses": ["```\niiii\nmmmm\n```", "plain"]}]).rank("me")
    font = page.locator(".card code").first.evaluate("element => getComputedStyle(element).fontFamily")
    assert "monospace" in font


def test_two_answers(start: Callable[..., Study]) -> None:
    rows = [{"prompt": f"Pair {i}", "responses": ["good", "bad"]} for i in range(6)]
    study = start(rows, mode="pairs")
    page = study.rank("me")
    wanted = {}
    for keys in (["1"], ["2"], ["3"], ["2", "ArrowLeft"], ["1", "="], ["x", "ArrowRight"]):
        order = shown(page)
        first, second = {"1": (1, 2), "2": (2, 1), "ArrowLeft": (1, 2), "ArrowRight": (2, 1)}.get(keys[-1], (1, 1))
        wanted[prompt(page)] = [first, second] if order[0] == "good" else [second, first]
        left, right = page.locator(".card").evaluate_all("cards => cards.map(card => card.getBoundingClientRect().x)")
        assert left < right
        press(page, *keys)
        go(page, "Enter")
    assert {row["prompt"]: row["ranks"] for row in study.export()} == wanted


def test_two_answers_by_buttons(start: Callable[..., Study]) -> None:
    study = start([{"prompt": f"Pair {i}", "responses": ["good", "bad"]} for i in range(3)], mode="pairs")
    page = study.rank("me", viewport={"width": 390, "height": 800})
    found = []
    for name in ("First is better", "Second is better", "Tie"):
        choice = page.get_by_role("button", name=name)
        choice.click()
        expect(choice).to_have_attribute("aria-pressed", "true")
        go(page, "Enter")  # submits, and does not press the button again
        found.append(study.posts[-1].post_data_json["ranks"])
    assert found == [[1, 2], [2, 1], [1, 1]]


def test_text_is_shown_literally(start: Callable[..., Study]) -> None:
    rows = [{"prompt": "\n".join(PAYLOADS), "responses": PAYLOADS}]
    rater = PAYLOADS[1]
    study = start(rows, raters=[rater, "ben"], overlap=2, tags=PAYLOADS[:1])
    for name in (rater, "ben"):
        page = study.visit(name)
        expect(page.get_by_role("heading", level=1)).to_have_text(f"Welcome, {name}")
        enter(page)
        assert sorted(shown(page)) == sorted(PAYLOADS)
        assert page.locator(".prompt .text").text_content() == "\n".join(PAYLOADS)
        place(page, *(sorted(PAYLOADS) if name == "ben" else PAYLOADS))
        press(page, "c")
        page.get_by_label("Comment", exact=True).fill("\n".join(PAYLOADS[:8]))
        page.get_by_label(PAYLOADS[0]).check()
        go(page, "Control+Enter")
        go(page, "u")
        expect(page.get_by_label("Comment", exact=True)).to_have_value("\n".join(PAYLOADS[:8]))
        expect(page.get_by_label(PAYLOADS[0])).to_be_checked()
        go(page, "Enter")
        expect(page.get_by_role("heading")).to_have_text(f"Thank you, {name}")
    owner = study.visit("owner")
    enter(owner)
    expect(owner.get_by_role("rowheader", name=rater)).to_have_text(rater)
    owner.locator(".disagreement summary").click()
    assert owner.locator("td.text").all_text_contents() == PAYLOADS
    assert study.complaints == []


def test_a_lost_answer_is_asked_for_again_and_counts_once(start: Callable[..., Study]) -> None:
    study = start([ABC])
    page = study.rank("me")
    answers = iter(["lost", "busy", "right"])

    def unreliable(route: Route) -> None:
        match next(answers):
            case "lost":  # the server has kept it, and nobody heard
                route.fetch()
                route.abort()
            case "busy":
                route.fulfill(status=503, json={"error": "The store is busy."})
            case "right":
                route.continue_()

    page.route("**/judgements", unreliable)
    place(page, "beta", "alpha", "gamma")
    page.get_by_role("button", name="Submit").dblclick()
    expect(page.get_by_role("alert")).to_have_text(
        "The server does not respond. Your work is kept; trying again in 1 s."
    )
    press(page, "1", "Enter")  # nothing more happens meanwhile
    expect(page.get_by_role("alert")).to_have_text("The store is busy. Your work is kept; trying again in 2 s.")
    expect(page.get_by_role("heading", name="Thank you")).to_be_visible()
    assert len(study.posts) == 3
    assert [row["ranks"] for row in study.export()] == [[2, 1, 3]]


def test_a_ranking_waits_for_a_killed_server(start: Callable[..., Study]) -> None:
    study = start([ABC])
    page = study.rank("me")
    place(page, "gamma", "alpha", "beta")
    study.kill()
    press(page, "Enter")
    expect(page.get_by_role("alert")).to_contain_text("The server does not respond. Your work is kept")
    study.revive()
    expect(page.get_by_role("heading", name="Thank you")).to_be_visible(timeout=20_000)
    assert [row["ranks"] for row in study.export()] == [[2, 3, 1]]


def test_what_the_server_refuses_stays_on_the_page(start: Callable[..., Study]) -> None:
    study = start([ABC])
    page = study.rank("me")
    stale = page.context.new_page()
    stale.goto(page.url)
    place(page, "alpha", "beta", "gamma")
    go(page, "Enter")
    place(stale, "gamma", "beta", "alpha")
    press(stale, "Enter")
    expect(stale.get_by_role("alert")).to_contain_text("ranked already")
    assert ranking(stale) == [["gamma"], ["beta"], ["alpha"]]
    assert [row["ranks"] for row in study.export()] == [[1, 2, 3]]


def test_an_undo_keeps_what_was_begun(start: Callable[..., Study]) -> None:
    page = start([ABC, {**ABC, "prompt": "And which?"}]).rank("me")
    place(page, "alpha", "beta", "gamma")
    go(page, "Enter")
    press(page, "c")
    page.get_by_label("Comment", exact=True).fill("half a thought")
    press(page, "Escape")
    place(page, "gamma")
    go(page, "u")
    assert (prompt(page), ranking(page)) == ("Which?", [["alpha"], ["beta"], ["gamma"]])
    go(page, "Enter")
    assert (prompt(page), ranking(page)) == ("And which?", [["gamma"]])
    expect(page.get_by_label("Comment", exact=True)).to_have_value("half a thought")


def test_the_time_is_that_for_which_the_page_was_visible(start: Callable[..., Study]) -> None:
    study = start([ABC])
    page = study.visit("me")
    page.clock.install()
    enter(page)
    page.clock.run_for(30_000)
    set_visible(page, "hidden")
    page.clock.run_for(500_000)
    set_visible(page, "visible")
    page.clock.run_for(12_000)
    page.reload()
    page.clock.run_for(5_000)
    press(page, "x")
    go(page, "Enter")
    assert study.posts[-1].post_data_json["seconds"] == pytest.approx(47, abs=2)


def set_visible(page: Page, state: str) -> None:
    page.evaluate(
        """state => {
            Object.defineProperty(document, "visibilityState", {value: state, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"));
            delete document.visibilityState;
        }""",
        state,
    )


def test_the_owner_sees_figures_that_renew_themselves(start: Callable[..., Study]) -> None:
    study = start([ABC, {**ABC, "prompt": "And which?"}], raters=["anna", "ben"], overlap=2)
    owner = study.visit("owner")
    owner.clock.install()
    enter(owner)
    expect(owner.get_by_text("0 of 2 items ranked by 2 raters")).to_be_visible()
    assert owner.locator(".value").all_inner_texts() == 4 * [DASH]
    expect(owner.get_by_text("Needs two raters on the same item; set overlap to 2 or more.")).to_be_visible()
    assert "None" not in owner.locator("main").inner_text()
    owner.get_by_text("Show the links").click()
    assert owner.locator(".links code").all_inner_texts() == [study.links[name] for name in ("anna", "ben", "owner")]
    for name, order in {"anna": ("alpha", "beta", "gamma"), "ben": ("alpha", "gamma", "beta")}.items():
        page = study.rank(name)
        for _ in range(2):
            place(page, *order)
            go(page, "Enter")
    owner.clock.run_for(10_500)
    expect(owner.get_by_text("2 of 2 items ranked by 2 raters")).to_be_visible()
    expect(owner.locator(".figure").nth(1)).to_contain_text("67%")  # of three pairs the raters say two the same way
    assert owner.locator("tbody th").first.inner_text() == "anna"
    assert owner.evaluate("document.activeElement.textContent") == "Show the links"
    assert owner.locator("#links").get_attribute("open") == ""
    owner.locator(".disagreement summary").first.click()
    assert table(owner) == {"alpha": ["1", "1"], "beta": ["2", "3"], "gamma": ["3", "2"]}


def table(page: Page) -> dict[str, Any]:
    rows = page.locator(".disagreement").first.locator("tbody tr").all()
    return {cells[0]: cells[1:] for cells in (row.locator("td").all_inner_texts() for row in rows)}


def test_a_stranger_reads_why(start: Callable[..., Study]) -> None:
    study = start([ABC])
    page = study.visit("me")
    page.context.clear_cookies()
    for path in ("rank", "owner", "nowhere", "enter?token=guess"):
        page.goto(study.links["me"].rpartition("/")[0] + "/" + path)
        expect(page.get_by_role("heading", name="The request failed")).to_be_visible()
        assert page.get_by_text("alpha").count() == 0
