"""Two raters rank ten items, one by keyboard, one by mouse; the export is exactly what they did."""

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from .study import Study, button, card, drag, go, place, press, prompt, ranking, shown

pytestmark = pytest.mark.slow

LETTERS = "ABCD"
ROWS = [{"prompt": f"Item {i}", "responses": [f"{letter} of {i}" for letter in LETTERS]} for i in range(1, 11)]

# What anna presses on each item: a letter is the number key of that answer, with + the same with Shift. And the ranks
# of A, B, C, D that this means; None = cannot judge.
KEYS: dict[int, list[str]] = {
    1: ["B", "A", "D", "C"],
    2: ["C", "+A", "D", "B"],
    3: ["D", "=", "B", "=", "C", "A"],
    4: ["A", "B", "A", "C", "A", "D"],  # A in, out and in again
    5: ["A", "B", "C", "D", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "Alt+ArrowUp", "Alt+ArrowUp"],
    6: ["A", "B", "C", "D", "ArrowUp", "ArrowUp", "t"],
    7: ["A", "B", "Backspace", "C", "B", "D"],
    8: ["A", "x"],
    9: ["A", "B", "reload", "C", "D"],
    10: ["c", *"too easy", "Escape", "D", "+C", "+B", "+A"],
}
ANNA = {
    1: [2, 1, 4, 3],
    2: [1, 3, 1, 2],
    3: [2, 1, 1, 1],
    4: [4, 3, 2, 1],  # after an undo; first it was B, C, A, D
    5: [1, 3, 4, 2],
    6: [1, 2, 2, 3],
    7: [1, 3, 2, 4],
    8: None,
    9: [1, 2, 3, 4],
    10: [1, 1, 1, 1],
}

# What ben does with the mouse: a button and its answer, or a way to drop an answer and where.
CLICKS: dict[int, list[tuple[str, ...]]] = {
    1: [("into", "B"), ("below", "A", "B"), ("above", "C", "A"), ("below", "D", "A")],
    2: [("into", "A"), ("onto", "C", "A"), ("below", "B", "C"), ("below", "D", "B")],
    3: [("Place", "A"), ("Place", "B"), ("Place", "C"), ("Place", "D"), ("Move .* down", "A"), ("Move .* down", "A")],
    4: [("Place", "A"), ("Place", "B"), ("Place", "C"), ("Place", "D"), ("above", "C", "A")],
    5: [("Place", "B"), ("Place", "A"), ("Place", "C"), ("Place", "D"), ("Move .* up", "D")],
    6: [("Place", "A"), ("Place", "B"), ("Place", "C"), ("Place", "D"), ("Tie", "B")],
    7: [("Place", "B"), ("Place", "A"), ("Place", "C"), ("out", "B"), ("above", "B", "C"), ("Place", "D")],
    8: [("Cannot judge",)],
    9: [
        ("Place", "D"),
        ("Place", "C"),
        ("reload",),
        ("Place", "B"),
        ("Take .* out", "D"),
        ("onto", "D", "C"),
        ("Place", "A"),
    ],
    10: [("Place", "B"), ("Tie", "C"), ("Place", "D"), ("above", "A", "D")],
}
BEN = {
    1: [3, 1, 2, 4],
    2: [1, 2, 1, 3],
    3: [3, 1, 2, 4],
    4: [2, 3, 1, 4],
    5: [2, 1, 4, 3],
    6: [1, 1, 2, 3],
    7: [1, 2, 3, 4],
    8: None,
    9: [3, 2, 1, 1],
    10: [2, 1, 1, 3],
}
DROPS = {"above": 0.05, "onto": 0.5, "below": 0.95}
POST = """([body, token]) => fetch("/judgements", {
    method: "POST",
    body: JSON.stringify(body),
    headers: {"Content-Type": "application/json", "X-Keel-Token": token},
}).then(answer => answer.status)"""


def item_of(page: Page) -> int:
    return int(prompt(page).removeprefix("Item "))


def by_keyboard(page: Page, i: int) -> None:
    numbers = {text[0]: str(at) for at, text in enumerate(shown(page), start=1)}
    for key in KEYS[i]:
        if key == "reload":
            page.reload()
        elif key.strip("+") in LETTERS:
            press(page, ("Shift+" if "+" in key else "") + numbers[key[-1]])
        else:
            press(page, key)


def by_mouse(page: Page, i: int) -> None:
    for act, *letters in CLICKS[i]:
        texts = [f"{letter} of {i}" for letter in letters]
        if act == "reload":
            page.reload()
        elif act == "into":
            drag(page, texts[0], page.locator(".empty"))
        elif act == "out":
            drag(page, texts[0], page.locator("#pool"))
        elif act in DROPS:
            drag(page, texts[0], card(page, texts[1]), DROPS[act])
        elif texts:
            button(page, texts[0], act).click()
        else:
            page.get_by_role("button", name=act).click()


def test_what_they_did_is_what_is_exported(start: Callable[..., Study]) -> None:
    study = start(ROWS, raters=["anna", "ben"], overlap=2)
    anna, ben = study.rank("anna"), study.rank("ben")
    for turn in range(10):
        expect(anna.locator(".progress")).to_contain_text(f"{turn} of 10")
        by_keyboard(anna, item := item_of(anna))
        go(anna, "Enter")
        if item == 4:
            change_of_mind(anna)
        by_mouse(ben, item := item_of(ben))
        submit_by_mouse(study, ben, item)
    for page in (anna, ben):
        expect(page.get_by_role("heading")).to_contain_text("Thank you")

    rows = study.export()
    found = {(row["rater"], int(row["prompt"].removeprefix("Item "))): row["ranks"] for row in rows}
    wanted = {("anna", i): ranks for i, ranks in ANNA.items()} | {("ben", i): ranks for i, ranks in BEN.items()}
    assert found == {key: ranks for key, ranks in wanted.items() if ranks}
    assert len(rows) == 18
    assert all(row["responses"] == [f"{letter} of {row['prompt'][5:]}" for letter in LETTERS] for row in rows)
    assert [row["comment"] for row in rows if row["comment"]] == ["too easy"]
    figures = study.figures()
    assert (figures["judgements"], figures["complete"], figures["cannot_judge"]) == (20, 10, 2)


def change_of_mind(page: Page) -> None:
    """What was submitted is on the page again after an undo; the other way round is sent."""
    go(page, "u")
    assert ranking(page) == [["B of 4"], ["C of 4"], ["A of 4"], ["D of 4"]]
    place(page, "A of 4", "B of 4", "C of 4", "D of 4")  # all out
    assert ranking(page) == []
    place(page, "D of 4", "C of 4", "B of 4", "A of 4")
    go(page, "Enter")


def submit_by_mouse(study: Study, page: Page, item: int) -> None:
    """Item 9 by a double click; item 7 comes once more, as a proxy might repeat it; item 6 is undone and sent again."""
    sent = len(study.posts)
    with page.expect_navigation():
        page.get_by_role("button", name="Submit").click(click_count=2 if item == 9 else 1)
    (post,) = study.posts[sent:]
    if item == 7:
        body, token = post.post_data_json, post.headers["x-keel-token"]
        assert page.evaluate(POST, [body, token]) == 200
        assert page.evaluate(POST, [{**body, "ranks": [1, 1, 1, 1]}, token]) == 409
    if item == 6:
        with page.expect_navigation():
            page.get_by_role("button", name="Undo last").click()
        assert ranking(page) == [["A of 6", "B of 6"], ["C of 6"], ["D of 6"]]
        with page.expect_navigation():
            page.get_by_role("button", name="Submit").click()


def test_a_lazy_submit_records_nothing(start: Callable[..., Study]) -> None:
    study = start(ROWS[:1])
    page = study.rank("me")
    press(page, "Enter", "Enter")
    expect(page.get_by_role("status")).to_have_text("Four responses are not ranked yet.")
    place(page, "A of 1", "B of 1", "C of 1")
    page.get_by_role("button", name="Submit").click(force=True)  # it says that it is disabled
    expect(page.get_by_role("status")).to_have_text("One response is not ranked yet.")
    assert study.posts == []


def test_each_rater_sees_an_order_of_their_own(start: Callable[..., Study]) -> None:
    study = start(ROWS[:3], raters=["anna", "ben"], overlap=2)
    orders: dict[str, dict[str, Any]] = {"anna": {}, "ben": {}}
    for name, found in orders.items():
        page = study.rank(name)
        for _ in ROWS[:3]:
            found[prompt(page)] = "".join(text[0] for text in shown(page))
            press(page, "x")
            go(page, "Enter")
    assert orders["anna"].keys() == orders["ben"].keys() == {"Item 1", "Item 2", "Item 3"}
    assert orders["anna"] != orders["ben"]
    assert set(orders["anna"].values()) != {LETTERS}
