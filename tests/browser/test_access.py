"""Everybody can use the pages: on a phone, by keyboard alone, by a screen reader, in light and dark."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from .accessibility import violations
from .study import PHONE, WIDE, Study, card, drag, enter, go, middle, place, press, ranking, shown, studying

pytestmark = pytest.mark.slow

LONG = "x" * 400
MANY = {"prompt": LONG, "responses": ["one", "two", LONG, "four\n" * 30]}
PAIR = {
    "prompt": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": LONG}],
    "responses": ["a", LONG],
}


@pytest.fixture(scope="module")
def study(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """One for all: every test is a rater of its own, and all have the same item before them."""
    raters = ["tabs", "ears", "finger", "mouse", "escape"]
    with studying(browser, tmp_path_factory.mktemp("study"), [MANY], raters=raters, overlap=5) as study:
        yield study


def pages(study: Study) -> Iterator[tuple[str, Page]]:
    """Every page, in each state that looks different."""
    page = study.visit("me")
    yield "enter", page
    enter(page)
    page.locator(".remarks summary").click()
    yield "many", page
    press(page, "1", "2", "Shift+3")
    yield "ranked", page
    press(page, "?")
    yield "keys", page
    press(page, "Escape")
    expect(page.locator("#keys")).to_be_hidden()
    press(page, "x")
    yield "cannot", page
    go(page, "Enter")
    press(page, "1")
    yield "two", page
    go(page, "Enter")
    yield "done", page
    page.goto(page.url.replace("/rank", "/nowhere"))
    yield "error", page
    owner = study.visit("owner")
    enter(owner)
    owner.locator("#links summary").click()
    yield "owner", owner


@pytest.fixture(scope="module")
def survey(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of every page: what axe finds wrong, how wide it is on a phone, and what a screen reader reads."""
    settings = {"tags": ["unsafe", LONG[:60]], "instructions": __file__}
    found: dict[str, dict[str, Any]] = {}
    with studying(browser, tmp_path_factory.mktemp("survey"), [MANY, PAIR], **settings) as study:
        for name, page in pages(study):
            found[name] = look_at(page)
    return found


def look_at(page: Page) -> dict[str, Any]:
    found = {"tree": page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]}
    found["violations"] = violations(page)
    page.set_viewport_size(PHONE)
    found["width"] = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size(WIDE)
    return found


def test_no_page_scrolls_sideways_on_a_phone(survey: dict[str, dict[str, Any]]) -> None:
    assert {name: page["width"] for name, page in survey.items() if page["width"] != 360} == {}
    assert len(survey) == 9


def test_axe_finds_nothing(survey: dict[str, dict[str, Any]]) -> None:
    assert {name: page["violations"] for name, page in survey.items() if page["violations"]} == {}


def test_every_control_has_a_name_of_its_own(survey: dict[str, dict[str, Any]]) -> None:
    """As the browser tells a screen reader."""
    for where, page in survey.items():
        controls = [
            (node["role"]["value"], node.get("name", {}).get("value", "").strip())
            for node in page["tree"]
            if not node["ignored"] and node["role"]["value"] != "RootWebArea"
            if any(each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", []))
        ]
        assert all(name for _, name in controls), (where, controls)
        assert len(controls) == len(set(controls)), (where, controls)


def test_by_tab_and_enter_alone(study: Study) -> None:
    """With the single keys switched off, as somebody who speaks to the computer would have it."""
    page = study.visit("tabs")
    tab_to(page, "Begin")
    go(page, "Enter")
    tab_to(page, "Keys")
    press(page, "Enter")
    tab_to(page, "Use these keys")
    press(page, "Space")
    tab_to(page, "Close")
    press(page, "Enter", "1")
    assert ranking(page) == []
    first, second, *_ = shown(page)
    tab_to(page, "Place response 2 next")
    press(page, "Enter")
    assert page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.tagName") == "ARTICLE"
    tab_to(page, "Place response 1 next")
    press(page, "Enter")
    tab_to(page, "Move response 1 up")
    press(page, "Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Move response 1 up"
    assert ranking(page) == [[first], [second]]
    expect(page.get_by_role("status")).to_have_text("Response 1 is now first of four.")
    tab_to(page, "Tie response 3")
    press(page, "Enter")
    tab_to(page, "Place response 4 next")
    press(page, "Enter")
    expect(page.get_by_role("status")).to_have_text(
        "Response 4 is now third of four. All responses are ranked; you can submit."
    )
    tab_to(page, "Submit")
    go(page, "Enter")
    assert study.posts[-1].post_data_json["ranks"] == [1, 2, 2, 3]


def tab_to(page: Page, name: str) -> None:
    """Press Tab until the control with this name has the focus; it must then be seen to have it."""
    focused = """(e => [
        e.ariaLabel ?? e.closest("label")?.innerText ?? e.innerText, getComputedStyle(e).outlineWidth
    ])(document.activeElement)"""
    for _ in range(60):
        press(page, "Tab")
        label, outline = page.evaluate(focused)
        if label.strip().startswith(name):
            assert outline == "3px"
            return
    pytest.fail(f"Tab never comes to {name!r}")


def test_a_screen_reader_hears_what_happened(study: Study) -> None:
    page = study.rank("ears")
    status = page.get_by_role("status")
    for key, said in {
        "3": "Response 3 is now first of four.",
        "1": "Response 1 is now second of four.",
        "Shift+2": "Response 2 is now second of four, tied with response 1.",
        "ArrowDown": "Response 2 is now second of four, tied with response 1.",
        "Alt+ArrowDown": "Response 3 is now second of four.",
        "Backspace": "Undid one step. One response is not ranked yet.",
        "2": "Response 2 is not ranked.",
        "=": "Tie with the last response placed: press the number of a response.",
        "4": "Response 4 is now second of four, tied with response 1.",
        "x": "Marked as: cannot judge. You can submit.",
    }.items():
        press(page, key)
        expect(status).to_have_text(said)


def test_dragging_by_finger(study: Study) -> None:
    page = study.rank("finger", viewport=PHONE, has_touch=True)
    place(page, "two")
    page.locator("h1").evaluate("() => scrollTo(0, 0)")
    finger = page.context.new_cdp_session(page)

    def touch(kind: str, *point: float) -> None:
        points = [{"x": point[0], "y": point[1]}] if point else []
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    card(page, "one").scroll_into_view_if_needed()
    touch("touchStart", *middle(card(page, "one").locator(".grip")))
    touch("touchMove", *middle(card(page, "two"), 0.6))
    touch("touchMove", *middle(card(page, "two"), 0.1))
    touch("touchEnd")
    assert ranking(page) == [["one"], ["two"]]


def test_long_answers_make_room_while_one_is_dragged(study: Study) -> None:
    page = study.rank("mouse")
    place(page, "four\n" * 30, LONG, "one", "two")
    drag(page, "two", card(page, "four\n" * 30), 0.05)
    assert [text[:4] for (text,) in ranking(page)] == ["two", "four", "xxxx", "one"]
    assert page.locator(".sorting, .lifted, [data-drop]").count() == 0


def test_escape_leaves_a_drag(study: Study) -> None:
    page = study.rank("escape")
    place(page, "one")
    page.mouse.move(*middle(card(page, "two").locator(".name")))
    page.mouse.down()
    page.mouse.move(*middle(card(page, "one")), steps=3)
    press(page, "Escape")
    page.mouse.up()
    assert ranking(page) == [["one"]]
