"""The pages as a browser gets them: links, items, undo, the owner's figures; and the verb that serves them."""

import json
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from keel.cli.main import main
from keel.config import RankConfig, parse
from keel.data.items import UnrankedResponses
from keel.errors import ConfigError
from keel.ranking.store import Store
from keel.web.pages import page_turns, split_code
from keel.web.rank import app as web
from keel.web.rank.serve import serve_ranking
from keel.web.rank.study_metrics import store_metrics

from .visits import ADDRESS, ROWS, Process, Visitor, free_port, study

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'none'; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


def test_a_private_link_leads_in(tmp_path: Path):
    there = study(tmp_path, instructions="Be <kind>.")
    anna = Visitor(there.browser(), web.private_links(there.store, there.settings)["anna"])
    answer = anna.enter()
    assert answer.status_code == 200
    token = there.store.tokens()["anna"]
    assert anna.link == f"{ADDRESS}/enter?token={token}"
    assert answer.headers["set-cookie"] == f"keel-8642={token}; HttpOnly; Path=/; SameSite=strict"
    assert "anna" in answer.text
    assert "Be &lt;kind&gt;." in answer.text
    assert 'href="/rank"' in answer.text
    assert 'href="/owner"' in Visitor(there.browser(), web.private_links(there.store, there.settings)[""]).enter().text


def test_the_owner_and_a_rater_share_a_browser(tmp_path: Path):
    there = study(tmp_path)
    anna = there.visitor("anna")
    anna.client.get(web.private_links(there.store, there.settings)[""])
    assert anna.client.get(f"{ADDRESS}/owner").status_code == 200
    assert anna.client.get(f"{ADDRESS}/rank").status_code == 200


def test_an_item_is_judged_and_the_next_one_comes(tmp_path: Path):
    there = study(tmp_path)
    anna, done = there.visitor("anna"), []
    while (page := anna.load()) is not None:
        assert anna.load() == page
        answer = anna.say(page, [2, 1, None], comment="because", seconds=0.5)
        assert (answer.status_code, answer.json()) == (200, {"next": "/rank"})
        done.append(page)
    assert [sorted(page.answers) for page in done] == [list(row.responses) for row in ROWS]
    for page, judgement in zip(done, there.store.judgements(), strict=True):
        ranks = dict(zip(judgement.item.responses, judgement.ranks or (), strict=True))
        assert [ranks[text] for text in page.answers] == [2, 1, None]
        assert judgement.comment == "because"
    last = anna.client.get(f"{ADDRESS}/rank").text
    assert "nothing left" in last
    csrf = re.search('data-csrf="(.*?)"', last)
    assert csrf is not None
    assert csrf[1] == done[0].csrf
    assert anna.post("/undo", {}, csrf[1]).json() == {"next": "/rank"}
    again = anna.load()
    assert again is not None
    assert (again.answers, again.previous["ranks"]) == (done[-1].answers, [2, 1, None])


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool", "x"])
def test_a_conversation_shows_who_speaks(role: str):
    messages: Any = [{"role": role, "content": "hi"}]
    known = role if role in ("user", "assistant", "system") else "other"
    assert page_turns(messages) == [{"role": role, "kind": known, "text": "hi"}]
    assert page_turns("hi") == [{"role": "", "kind": "", "text": "hi"}]


def test_a_turn_without_text_shows_what_it_holds():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {"at": "<b>"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}
    messages: Any = [call, parts, {"role": "tool", "content": ""}]
    first, second, third = (turn["text"] for turn in page_turns(messages))
    assert json.loads(first) == {"tool_calls": call["tool_calls"]}
    assert second.split("\n") == ["see", '{"type": "image"}']
    assert third == ""


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no code", []),
        ("a\n```python\nx = 1\n\ny\n```\nb", ["```python\nx = 1\n\ny\n```"]),
        ("a\n```\nnever ends", ["```\nnever ends"]),
        ("~~~\n```\n~~~\nb", ["~~~\n```\n~~~"]),
        ("call `f(x)` now", ["`f(x)`"]),
        ("def f():\n    return 1\n\nend", ["    return 1\n"]),
        ("one ` alone", []),
        ("```\n<script>\n```", ["```\n<script>\n```"]),
    ],
)
def test_code_is_marked_and_the_text_stays(text: str, code: list[str]):
    parts = split_code(text)
    assert [part for is_code, part in parts if is_code] == code
    assert "".join(part for _, part in parts) == text


def test_code_is_set_in_its_own_font_and_escaped(tmp_path: Path):
    there = study(tmp_path, [UnrankedResponses("question", ("```\n<script>\n```\n", " plain <b>\n"))])
    shown = there.visitor("anna").client.get(f"{ADDRESS}/rank").text
    assert "<code>```\n&lt;script&gt;\n```</code>\n</div>" in shown
    assert '<div class="text" dir="auto"> plain &lt;b&gt;\n</div>' in shown


def test_code_is_found_in_time_however_odd_the_text():
    for text in ("`" * 200_000, "```\n" * 50_000, "    \n" * 50_000, "`a" * 100_000):
        began = time.monotonic()
        split_code(text)
        assert time.monotonic() - began < 5


def test_equal_answers_are_said_to_be(tmp_path: Path):
    there = study(tmp_path, [UnrankedResponses("question", ("same", "other", "same"))])
    page = there.visitor("anna").client.get(f"{ADDRESS}/rank").text
    assert page.count("The same text as response") == 1


def test_items_that_nobody_could_judge_are_not_ranked(tmp_path: Path):
    there = study(tmp_path)
    anna = there.visitor("anna")
    while (page := anna.load()) is not None:
        assert anna.say(page, None).status_code == 200
    found = there.visitor("").client.get(f"{ADDRESS}/owner/stats.json").json()
    assert (found["complete"], found["ranked"], found["cannot_judge"]) == (4, 0, 4)
    assert "0 of 4 items ranked" in there.visitor("").client.get(f"{ADDRESS}/owner").text


def test_raters_do_not_see_each_other(tmp_path: Path):
    there = study(tmp_path, overlap=2)
    anna, ben = there.visitor("anna"), there.visitor("ben")
    page = anna.load()
    assert page is not None
    anna.say(page, [1, 2, 3], comment="what anna thinks")
    for path in ("/rank", "/owner", "/owner/stats.json", "/"):
        answer = ben.client.get(ADDRESS + path)
        assert "anna" not in answer.text
        assert path == "/rank" or answer.status_code in (401, 404)
    page = ben.load()
    assert page is not None
    assert page.previous is None


def test_the_owner_sees_the_figures_and_the_links(tmp_path: Path):
    there = study(tmp_path, overlap=2)
    for name in ("anna", "ben"):
        visitor = there.visitor(name)
        page = visitor.load()
        assert page is not None
        assert visitor.say(page, [1, 2, 3] if name == "anna" else None).status_code == 200
    owner = there.visitor("")
    answer = owner.client.get(f"{ADDRESS}/owner")
    assert answer.status_code == 200
    for name, token in there.store.tokens().items():
        assert name in answer.text
        assert f"/enter?token={token}" in answer.text
    figures = owner.client.get(f"{ADDRESS}/owner/stats.json").json()
    assert (figures["items"], figures["judgements"], figures["cannot_judge"]) == (4, 2, 1)


def test_figures_are_not_computed_for_every_poll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[float] = []

    def slow(*_: Any) -> dict[str, Any]:
        calls.append(time.monotonic())
        time.sleep(0.05)
        return {}

    monkeypatch.setattr("keel.ranking.agreement.summary", slow)
    monkeypatch.setattr(web, "FRESH_SECONDS", 0.0)
    owner = study(tmp_path).visitor("")
    deadline = time.monotonic() + 1.3
    while time.monotonic() < deadline:
        assert owner.client.get(f"{ADDRESS}/owner/stats.json").json() == {}
    assert 2 <= len(calls) <= 3  # one, then ten times as long without


def test_figures_of_a_large_study_come_from_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = study(tmp_path, overlap=2)
    for name in ("anna", "ben"):
        visitor = there.visitor(name)
        page = visitor.load()
        assert page is not None
        visitor.say(page, [1, 2, 3])
    here = store_metrics(there.store)
    monkeypatch.setattr(web, "MAX_IN_PROCESS", 1)
    monkeypatch.setattr(web, "store_metrics", lambda _: pytest.fail("it is worked out here"))
    assert there.visitor("").client.get(f"{ADDRESS}/owner/stats.json").json() == here
    assert there.store.num_judgements() == 2


def test_every_answer_has_the_headers_and_static_files_their_kind(tmp_path: Path):
    there = study(tmp_path)
    anna, owner = there.visitor("anna"), there.visitor("")
    answers = [
        *(anna.client.get(ADDRESS + path) for path in ("/rank", "/enter", "/owner", "/nothing", "/static/style.css")),
        *(owner.client.get(ADDRESS + path) for path in ("/owner", "/owner/stats.json", "/static/rank.js")),
        anna.client.get(f"{ADDRESS}/rank", headers={"Host": "evil.com"}),
        anna.client.post(f"{ADDRESS}/judgements"),
        anna.client.put(f"{ADDRESS}/rank"),
        anna.client.options(f"{ADDRESS}/rank"),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 401, 404, 200, 200, 200, 200, 400, 403, 405, 405]
    for answer in answers:
        assert HEADERS.items() <= dict(answer.headers).items()
        kept = answer in (answers[4], answers[7])  # by the browser, which asks whether they are still the same
        assert answer.headers["cache-control"] == ("no-cache" if kept else "no-store")
        assert len(answer.headers.get_list("content-security-policy")) == 1
    assert answers[4].headers["content-type"] == "text/css; charset=utf-8"
    assert answers[7].headers["content-type"] == "text/javascript; charset=utf-8"


def test_a_mistake_of_ours_is_said_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = study(tmp_path)
    anna = there.visitor("anna")
    monkeypatch.setattr(Store, "deal", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the server's log gets it
        anna.client.get(f"{ADDRESS}/rank")
    anna.client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]
    answer = anna.client.get(f"{ADDRESS}/rank")
    assert (answer.status_code, "ZeroDivision" in answer.text) == (500, False)
    assert HEADERS.items() <= dict(answer.headers).items()


# ---- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    rows = [{"prompt": row.prompt, "responses": row.responses} for row in ROWS]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "answers.jsonl"


@pytest.mark.slow
def test_rank_serve_stop_go_on_export(tmp_path: Path, answers: Path, capsys: pytest.CaptureFixture[str]):
    store, port = tmp_path / "ratings.db", free_port()
    for round_, done in ((1, 3), (2, 4)):
        server = Process.start(store, port, *([str(answers), "--raters=anna", "--raters=ben"] if round_ == 1 else []))
        assert list(server.links) == [str(store), "anna", "ben", "owner"]
        assert (
            server.links[str(store)] == f"4 items ({4 if round_ == 1 else 0} new), {0 if round_ == 1 else 3} rankings"
        )
        with httpx.Client() as client:
            anna = Visitor(client, server.links["anna"])
            anna.enter()
            while (page := anna.load()) is not None and Store.open(str(store)).num_judgements() < done:
                assert anna.say(page, [1, 2, 3]).status_code == 200
        code, out, err = server.stop()
        assert (code, out) == (0, f"stopped; {done} rankings in {store}; continue with the same command\n")
        assert "Traceback" not in err
    exported = tmp_path / "rankings.jsonl"
    assert main(["rank", "--store", str(store), "--export", str(exported), "--form", "pairs"]) == 0
    assert f"next: keel reward --data.path {exported}" in capsys.readouterr().out
    assert len(exported.read_text().splitlines()) == 4 * 3
    assert main(["rank", "--store", str(store), "--stats"]) == 0
    assert "anna" in capsys.readouterr().out
    assert main(["rank", "--store", str(store), "--stats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["judgements"] == 4


def test_it_serves_until_enough_is_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    there = study(tmp_path, port=free_port(), instructions=None)
    store = there.store
    thread = threading.Thread(target=serve_ranking, args=(store, there.settings, lambda: store.num_judgements() >= 2))
    thread.start()
    with httpx.Client() as client:
        anna = Visitor(client, web.private_links(store, there.settings)["anna"])
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                anna.enter()
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        for _ in range(2):
            page = anna.load()
            assert page is not None
            anna.say(page, None)
    thread.join(20)
    assert not thread.is_alive()
    assert store.num_judgements() == 2
    assert capsys.readouterr().out.splitlines() == [
        f"{name or 'owner'}: {link}" for name, link in web.private_links(store, there.settings).items()
    ]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "neither answers nor a store": ([], "{store}: no such store -> create it: keel rank responses.jsonl"),
    "figures of nothing": (["--stats"], "{store}: no such store -> create it: keel rank responses.jsonl"),
    "an export of nothing": (["--export", "x.jsonl"], "{store}: no such store -> create it: keel rank responses.jsonl"),
    "no answers": (["--answers", "none.jsonl"], "none.jsonl: No such file or directory -> give a file that exists"),
    "no name": (["--answers", "{answers}", "--raters", "a" * 65], "is not a name of 1 to 64 printable characters"),
    "reach": (["--answers", "{answers}", "--host", "0.0.0.0", "--names", "box"], "host: 0.0.0.0 can be reached from"),
    "nobody's name": (["--answers", "{answers}", "--host", "0.0.0.0", "--public", "true"], "host 0.0.0.0 needs names"),
    "no instructions": (
        ["--answers", "{answers}", "--instructions", "no.txt"],
        "instructions: cannot read no.txt: No such",
    ),
    "no such host": (["--answers", "{answers}", "--host", "127.0.0.1", "--port", "{taken}"], "port: cannot listen at"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_on_the_command_line(
    tmp_path: Path, answers: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it serves"))
    flags, expected = MISTAKES[name]
    store = tmp_path / "ratings.db"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = {"store": store, "answers": answers, "taken": taken.getsockname()[1]}
        code = main(["rank", "--store", str(store), *(flag.format(**words) for flag in flags)])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("keel: error: ")
    assert expected.format(**words) in captured.err
    assert "token" not in captured.out


def test_the_store_is_not_exported_over_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    there = study(tmp_path)
    assert main(["rank", "--store", there.settings.store, "--export", there.settings.store]) == 2
    assert "this is the store itself" in capsys.readouterr().err
    assert len(there.store.items()) == 4


def test_a_store_keeps_its_raters_unless_new_ones_are_named(
    tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("keel.web.rank.serve.serve_ranking", lambda *_: None)
    path = str(tmp_path / "ratings.db")
    assert main(["rank", str(answers), "--store", path]) == 0
    assert Store.open(path).raters() == ["me"]
    assert main(["rank", "--store", path, "--raters", "anna"]) == 0
    assert main(["rank", "--store", path]) == 0
    assert Store.open(path).raters() == ["me", "anna"]


def test_pairs_are_cut_from_longer_rows(tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("keel.web.rank.serve.serve_ranking", lambda *_: None)
    path = str(tmp_path / "ratings.db")
    for _ in range(2):
        assert main(["rank", str(answers), "--store", path, "--mode", "pairs"]) == 0
    assert [len(item.responses) for item in Store.open(path).items()] == [2] * 8


def test_links_name_the_place_where_raters_find_it(tmp_path: Path):
    store = study(tmp_path).store
    for settings, expected in (
        ({"host": "::1"}, "http://[::1]:8642/enter?token="),
        ({"host": "0.0.0.0", "names": ["box", "10.0.0.5"]}, "http://box:8642/enter?token="),
        ({"host": "10.0.0.5", "port": 9000}, "http://10.0.0.5:9000/enter?token="),
    ):
        assert web.private_links(store, RankConfig(**settings))["anna"].startswith(expected)
    with pytest.raises(ConfigError, match=r"host :: needs names"):
        parse(RankConfig, {"host": "::"})


def test_it_starts_without_what_it_does_not_need():
    import subprocess

    script = (
        "import sys; import keel.web.rank.serve, keel.ranking.store\n"
        "sys.exit(str({'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == "\n"


def test_behind_a_proxy_the_links_and_the_name_are_its_own(tmp_path: Path):
    there = study(tmp_path, address="https://rank.example")
    link = web.private_links(there.store, there.settings)["anna"]
    assert link.startswith("https://rank.example/enter?token=")
    browser, token = there.browser(), link.partition("=")[2]
    for name in ("rank.example", "rank.example:443", "RANK.EXAMPLE"):
        answer = browser.get(f"{ADDRESS}/enter?token={token}", headers={"Host": name})
        assert answer.status_code == 200
        assert "; secure" in answer.headers["set-cookie"].lower()
    assert browser.get(f"{ADDRESS}/enter?token={token}", headers={"Host": "other.example"}).status_code == 400
