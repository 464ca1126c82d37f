"""F-30 to F-34: the pages of `keel rank` against everything but a rater with a private link."""

import hmac
import json
import os
import re
import secrets
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from keel.data.items import UnrankedResponses
from keel.server.request_checks import HEADERS
from keel.web import pages
from keel.web.rank.app import private_links

from ..web.visits import ADDRESS, PORT, Loaded, Process, Study, Visitor, free_port, raw, serving, study
from .payloads import FORGED, HOSTS, NAMES, PAYLOADS, TRAVERSALS

CANARY = "canary-" + "7d1f"


# ---- F-30: paths -----------------------------------------------------------------------------------------------------

ROUTES = ["/static/", "/", "/enter/", "/rank/", "/owner/", "/owner/stats.json/", "/judgements/"]


def test_f30_no_path_leads_out_of_the_table_of_files(tmp_path: Path) -> None:
    canary = tmp_path / "canary.txt"
    canary.write_text(CANARY)
    linked = pages.HERE / "static" / "style.css"
    words = {"inside": str(canary)[1:], "absolute": str(canary), "link": os.path.relpath(canary, linked.parent)}
    hits, served = [], 0
    with serving(tmp_path) as there:
        port, token = there.settings.port, there.store.tokens()["anna"]
        head = f"Host: 127.0.0.1:{port}\r\nCookie: keel-{port}={token}\r\nConnection: close"
        for route in ROUTES:
            for text in TRAVERSALS:
                path = route + text.format(**words).replace(" ", "%20")
                answer = raw(port, f"GET {path} HTTP/1.1\r\n{head}\r\n\r\n".encode())
                status = int(answer.split(b" ", 2)[1])
                found = CANARY.encode() in answer or b"from starlette" in answer or b"{%" in answer
                if found or (status not in (400, 404, 405) and not is_a_page(path, status)):
                    hits.append((path, status))
                served += 1
    assert len(TRAVERSALS) >= 40
    assert served == len(TRAVERSALS) * len(ROUTES)
    assert hits == []


def is_a_page(path: str, status: int) -> bool:
    """A fragment or a query after a name that is known leads to it; everything else is refused."""
    return status == 200 and path in ("/static/rank.js#/../../app.py", "/static/rank.js?../../app.py")


# ---- F-31: scripts ---------------------------------------------------------------------------------------------------


class Structure(HTMLParser):
    """Tags with the names of their attributes, which is all that text must not change; and the text itself."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, ...]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.words += [value or "" for _, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment",))

    def handle_decl(self, decl: str) -> None:
        self.tags.append(("declaration",))

    def unknown_decl(self, data: str) -> None:
        self.tags.append(("unknown",))


def shown_with(folder: Path, text: str, name: str) -> dict[str, httpx.Response]:
    """Every page of a study in which everything that is text is this text."""
    folder.mkdir()
    rows = [
        UnrankedResponses(text, (text, f"{text} "), text),
        UnrankedResponses(
            [{"role": "user", "content": text}, {"role": text, "content": text}], (text, text + "!", text), text
        ),
    ]
    there = study(folder, rows, text, raters=[name, "ben"], overlap=2, tags=[text])
    found: dict[str, httpx.Response] = {}
    for rater in (name, "ben"):
        visitor = Visitor(there.browser(), private_links(there.store, there.settings)[rater])
        found[f"enter {rater == name}"] = visitor.enter()
        for ranks in ([1, 2], [1, 2, 3]):
            found[f"rank {rater == name} {len(ranks)}"] = visitor.client.get(f"{ADDRESS}/rank")
            page = visitor.load()
            assert page is not None
            in_order = ranks if rater == name else ranks[::-1]
            assert visitor.say(page, in_order, comment=text, tags=[text]).status_code == 200
        found[f"done {rater == name}"] = visitor.client.get(f"{ADDRESS}/rank")
        csrf = re.search('data-csrf="(.*?)"', found[f"done {rater == name}"].text)
        assert csrf is not None
        assert visitor.post("/undo", {}, csrf[1]).status_code == 200
        found[f"again {rater == name}"] = visitor.client.get(f"{ADDRESS}/rank")
        page = visitor.load()
        assert page is not None
        assert page.previous["comment"] == text
        assert page.previous["tags"] == [text]
        assert visitor.say(page, [1, 2, 3], comment=text).status_code == 200
    found["owner"] = there.visitor("").client.get(f"{ADDRESS}/owner")
    found["no page"] = there.browser().get(f"/{text}".replace("\x00", ""))
    found["no link"] = there.browser().get("/enter", params={"token": text})
    return found


@pytest.mark.slow
def test_f31_text_never_becomes_a_part_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "keel.ranking.store.response_order", lambda number, *_: list(range(number))
    )  # whatever the names
    plain = {name: Structure(page.text).tags for name, page in shown_with(tmp_path / "plain", "text", "anna").items()}
    hits, looked = [], 0
    for number, payload in enumerate(PAYLOADS):
        name = payload if payload in NAMES else f"anna {number}"
        for page, answer in shown_with(tmp_path / str(number), payload, name).items():
            seen = Structure(answer.text)
            expected = payload.replace("\x00", "\ufffd")
            literal = any(expected in word.replace("\x00", "\ufffd") for word in seen.words)
            if seen.tags != plain[page] or HEADERS.items() - {k.title(): v for k, v in answer.headers.items()}.items():
                hits.append((payload, page))
            if page.startswith(("rank", "again")) and not literal:
                hits.append((payload, f"{page}: not shown literally"))
            looked += 1
    assert len(PAYLOADS) >= 30
    assert len(NAMES) >= 30
    assert looked == len(PAYLOADS) * len(plain)
    assert hits == []


def test_f31_answers_are_anonymous(tmp_path: Path) -> None:
    there = study(tmp_path, [UnrankedResponses("p", ("a", "b"), CANARY)])
    for path in ("/rank", "/enter"):
        assert CANARY not in there.visitor("anna").client.get(ADDRESS + path).text


# ---- F-32: requests that other pages make --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("path", ["/judgements", "/undo"])
def test_f32_a_request_from_elsewhere_changes_nothing(tmp_path: Path, name: str, path: str) -> None:
    there, anna, ben, page = judged_once(tmp_path)
    other = ben.load()
    assert other is not None
    token = there.store.tokens()["anna"]
    words = {"link": token, "other": other.csrf, "short": page.csrf[:-1], "owner": there.store.owner_token()}
    forged = {key: value.format(**words) for key, value in FORGED[name].items()}
    body = {"deal": page.deal, "ranks": [1, 2, 3], "comment": "", "tags": [], "seconds": 1}
    headers = {"Origin": ADDRESS, "X-Keel-Token": page.csrf, **forged}
    client = there.browser() if "Cookie" in forged else anna.client
    answer = client.post(ADDRESS + path, json=body, headers={key: value for key, value in headers.items() if value})
    assert (answer.status_code, list(answer.json())) == (403, ["error"])
    assert there.store.num_judgements() == 1
    assert anna.load() == page
    assert "access-control-allow-origin" not in answer.headers


def judged_once(folder: Path) -> tuple[Study, Visitor, Visitor, Loaded]:
    """Anna has judged one item and has the next before her; ben has one too."""
    there = study(folder)
    anna, ben = there.visitor("anna"), there.visitor("ben")
    page = anna.load()
    assert page is not None
    assert anna.say(page, [1, 2, 3]).status_code == 200
    page = anna.load()
    assert page is not None
    return there, anna, ben, page


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/json-seq"]
)
def test_f32_only_json_is_read(tmp_path: Path, kind: str) -> None:
    """What a form of another site could send without asking first."""
    there, anna, _, page = judged_once(tmp_path)
    headers = {"Origin": ADDRESS, "X-Keel-Token": page.csrf, "Content-Type": kind}
    for path in ("/judgements", "/undo"):
        body = json.dumps({"deal": page.deal, "ranks": [1, 2, 3]})
        assert anna.client.post(ADDRESS + path, content=body, headers=headers).status_code == 415
    assert there.store.num_judgements() == 1


def test_f32_pages_of_browsers_with_and_without_fetch_metadata_may(tmp_path: Path) -> None:
    _, anna, _, page = judged_once(tmp_path)
    for more in ({"Origin": f"https://127.0.0.1:{PORT}"}, {"Origin": "", "Sec-Fetch-Site": "same-origin"}):
        answer = anna.post("/judgements", {"deal": page.deal, "ranks": None}, page.csrf, **more)
        assert answer.status_code == 200


def test_f32_looking_changes_nothing(tmp_path: Path) -> None:
    there, anna, _, page = judged_once(tmp_path)
    query = {"deal": page.deal, "ranks": "[1,2,3]", "csrf": page.csrf}
    tried = 0
    for path in ("/judgements", "/undo", "/rank", "/owner", "/enter", "/"):
        for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
            anna.client.request(method, ADDRESS + path, params=query, headers={"X-Keel-Token": page.csrf})
            tried += 1
    assert tried == 42
    assert there.store.num_judgements() == 1
    assert anna.load() == page


# ---- F-33: names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_f33_only_under_its_own_name(tmp_path: Path, host: str) -> None:
    there = study(tmp_path)
    anna = there.visitor("anna")
    for path in ("/rank", "/owner", "/static/style.css", "/nothing"):
        assert anna.client.get(ADDRESS + path, headers={"Host": host}).status_code == 400
    page = anna.load()
    assert page is not None
    assert anna.post("/judgements", {"deal": page.deal, "ranks": None}, page.csrf, Host=host).status_code == 400
    assert there.store.num_judgements() == 0


def test_f33_its_own_names(tmp_path: Path) -> None:
    there = study(tmp_path, host="0.0.0.0", names=["Box", "10.0.0.5"], public=True)
    anna = Visitor(there.browser(), private_links(there.store, there.settings)["anna"].replace("Box", "127.0.0.1"))
    anna.enter()
    hosts = [f"LOCALHOST:{PORT}", f"[::1]:{PORT}", f"127.0.0.1:{PORT}", f"BOX:{PORT}", f"10.0.0.5:{PORT}"]
    assert [anna.client.get(f"{ADDRESS}/rank", headers={"Host": host}).status_code for host in hosts] == [200] * 5
    assert anna.client.get(f"{ADDRESS}/rank", headers={"Host": f"10.0.0.6:{PORT}"}).status_code == 400


def test_f33_a_name_twice_or_in_the_request_line(tmp_path: Path) -> None:
    with serving(tmp_path) as there:
        port = there.settings.port
        own = f"Host: 127.0.0.1:{port}\r\n"
        for head in (
            f"GET /static/style.css HTTP/1.1\r\n{own}Host: evil.com\r\n\r\n",
            f"GET http://evil.com/static/style.css HTTP/1.1\r\n{own}Connection: close\r\n\r\n",
            "GET /static/style.css HTTP/1.1\r\nConnection: close\r\n\r\n",
            "GET /static/style.css HTTP/1.0\r\n\r\n",
        ):
            assert raw(port, head.encode()).split(b" ", 2)[1] in (b"400", b"404")


# ---- F-34: who may ---------------------------------------------------------------------------------------------------


def test_f34_tokens_cannot_be_guessed(tmp_path: Path) -> None:
    there = study(tmp_path)
    token = there.store.tokens()["anna"]
    last = "A" if token[-1] != "A" else "B"
    guesses = [
        "",
        "anna",
        "me",
        "owner",
        "null",
        "*",
        "%",
        token[:-1],
        token + "A",
        token[:-1] + last,
        token.swapcase(),
    ]
    guesses += [token[::-1], "☃", "' OR 1=1 --", *(secrets.token_urlsafe(24) for _ in range(100))]
    for guess in guesses:
        client = there.browser()
        assert client.get("/enter", params={"token": guess}).status_code == 404
        assert client.cookies.get(f"keel-{PORT}") is None
        cookie = f"keel-{PORT}={guess}; keel-owner-{PORT}={guess}".encode()
        assert client.get("/rank", headers={"Cookie": cookie}).status_code == 401
        assert client.get("/owner/stats.json", headers={"Cookie": cookie}).status_code == 401
    with_link = there.browser().get("/rank", params={"token": token})
    assert with_link.status_code == 401  # only /enter takes a link


def test_f34_tokens_are_new_in_each_study_and_long(tmp_path: Path) -> None:
    seen: set[str] = set()
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        store = study(tmp_path / str(number)).store
        seen |= {*store.tokens().values(), store.owner_token()}
    assert len(seen) == 60
    assert {len(token) for token in seen} == {32}  # 192 bits


def test_f34_secrets_are_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def noted(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr("keel.server.sign_in.hmac.compare_digest", noted)
    there = study(tmp_path)
    there.browser().get("/enter", params={"token": "x"})
    everybody = {*there.store.tokens().values(), there.store.owner_token()}
    assert {secret.decode() for secret in compared} == everybody  # all of them, whoever asks


def test_f34_what_is_another_raters_does_not_exist(tmp_path: Path) -> None:
    there, _, ben, page = judged_once(tmp_path)
    own = ben.load()
    assert own is not None
    theirs = [page.deal, there.store.judgements()[0].made]
    for deal in theirs:
        answer = ben.post("/judgements", {"deal": deal, "ranks": [1, 2, 3]}, own.csrf)
        assert (answer.status_code, answer.json()) == (404, {"error": "No such item was dealt to you."})
    assert ben.undo(own).status_code == 409
    assert there.store.num_judgements() == 1
    owner = there.visitor("")
    assert owner.client.get(f"{ADDRESS}/rank").status_code == 401
    for path in ("/owner", "/owner/stats.json"):
        assert ben.client.get(ADDRESS + path).status_code == 401


def test_f34_what_was_sent_may_come_again_and_counts_once(tmp_path: Path) -> None:
    there, anna, _, page = judged_once(tmp_path)
    for _ in range(5):
        assert anna.say(page, [1, 2, 3]).status_code == 200
    assert there.store.num_judgements() == 2


@pytest.mark.slow
def test_f34_secrets_are_in_the_links_and_nowhere_else(tmp_path: Path) -> None:
    store, port = tmp_path / "ratings.db", free_port()
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "p", "responses": ["a", "b"]}\n' * 1)
    server = Process.start(store, port, str(answers), "--raters=anna", "--raters=ben")
    secret = {link.partition("token=")[2] for name, link in server.links.items() if "token=" in link}
    said: list[str] = []
    with httpx.Client() as client:
        for name in ("anna", "owner"):
            visitor = Visitor(client, server.links[name])
            said.append(visitor.enter().text)
            said += [client.get(f"{visitor.address}{path}").text for path in ("/rank", "/nothing", "/owner/stats.json")]
        said.append(client.post(f"{visitor.address}/judgements", json={}).text)
        client.get(f"{visitor.address}/rank", headers={"Host": "evil.com"})
    raw(port, b"nonsense\r\n\r\n")
    raw(port, f"GET /enter?token={next(iter(secret))} HTTP/9.9\r\nHost: x\r\n\r\n".encode())
    code, out, err = server.stop()
    assert (code, len(secret)) == (0, 3)
    assert not any(token in text for token in secret for text in [*said, out, err])
