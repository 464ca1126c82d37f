"""F-37, F-38: who floods the pages of `keel rank`, or sends anything at all, is in nobody's way."""

import json
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from keel.web.rank.app import private_links

from ..web.visits import ADDRESS, Loaded, Process, Study, Visitor, free_port, raw, serving, study
from .flooding import all_at_once, are_cut_off, p95


@contextmanager
def another_user(there: Study | Process, times: list[float]) -> Iterator[None]:
    """Ben, who goes on loading and ranking; what each of his requests took is noted."""
    link = there.links["ben"] if isinstance(there, Process) else private_links(there.store, there.settings)["ben"]
    stop = threading.Event()

    def work() -> None:
        with httpx.Client(timeout=30) as client:
            ben = Visitor(client, link)
            ben.enter()
            while not stop.is_set():
                began = time.monotonic()
                page = ben.load()
                between = time.monotonic()
                assert page is not None
                assert ben.say(page, [1, 2, 3]).status_code == 200
                times.extend((between - began, time.monotonic() - between))
                time.sleep(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    rows = [{"prompt": f"question {i}", "responses": ["a", "b", "c"]} for i in range(3000)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [str(tmp_path / "answers.jsonl"), "--raters=anna", "--raters=ben"]
    there = Process.start(tmp_path / "ratings.db", free_port(), *flags)
    yield there
    there.kill()


def port_of(there: Process) -> int:
    return int(there.links["ben"].split(":")[2].partition("/")[0])


def with_token(there: Process) -> tuple[httpx.Client, Visitor, Loaded]:
    client = httpx.Client(timeout=30, limits=httpx.Limits(max_connections=250))
    anna = Visitor(client, there.links["anna"])
    anna.enter()
    page = anna.load()
    assert page is not None
    return client, anna, page


def signed(there: Process, page: Loaded, more: str) -> bytes:
    """The head of a request that anna's page could make."""
    port, token = port_of(there), there.links["anna"].partition("token=")[2]
    return (
        f"POST /judgements HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
        f"Cookie: keel-{port}={token}\r\nX-Keel-Token: {page.csrf}\r\nContent-Type: application/json\r\n{more}\r\n\r\n"
    ).encode()


def oversized(server: Process, page: Loaded) -> dict[bytes, tuple[bytes, ...]]:
    """Requests that are too large, and how each may end; b"" is a connection that was cut."""
    headers = b"".join(b"X-H%d: y\r\n" % i for i in range(10_000))
    return {
        signed(server, page, f"Content-Length: {2**30}"): (b"413",),
        signed(server, page, "Transfer-Encoding: chunked") + b"1ffff\r\n" + b"x" * 0x1FFFF + b"\r\n": (b"413", b""),
        b"GET /rank HTTP/1.1\r\n" + headers + b"\r\n": (b"400", b"431", b""),
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n": (b"400", b"414", b""),
    }


@pytest.mark.slow
def test_f37_others_go_on_while_one_floods(server: Process) -> None:
    times: list[float] = []
    client, anna, page = with_token(server)
    statuses: list[int] = []
    body = {"deal": page.deal, "ranks": [1, 2, 3], "comment": "x" * 3000}

    def flood() -> None:
        statuses.append(anna.post("/judgements", body, page.csrf).status_code)

    with another_user(server, times):
        time.sleep(1)
        calm = len(times)
        all_at_once([flood] * 200)
        for request, expected in oversized(server, page).items():
            assert raw(port_of(server), request)[9:12] in expected
    client.close()
    assert len(statuses) == 200
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= 1
    assert len(times) > calm + 10
    print(f"p95 of another user: {p95(times):.3f} s over {len(times)} requests; {statuses.count(503)} of 200 sent away")
    assert p95(times) < 1.0


@pytest.mark.slow
def test_f37_slow_clients_are_cut_off_and_nobody_notices(server: Process) -> None:
    times: list[float] = []
    client, _, _ = with_token(server)
    client.close()
    second = b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\nGET /rank HTTP/1.1\r\n"  # whose first is fine
    heads = [b"", b"POST /judgements HTTP/1.1\r\nHost: ", b"GET /rank HTTP/1.1\r\nX: " + b"y" * 1000]
    with another_user(server, times):
        assert are_cut_off(port_of(server), [heads[number % 3] for number in range(140)] + [second] * 10)
    assert p95(times) < 1.0


def test_f37_idle_connections_of_one_client_shut_nobody_out(tmp_path: Path) -> None:
    with many_files(2000), serving(tmp_path) as there, httpx.Client(timeout=10) as client, ExitStack() as idle:
        port = there.settings.port
        anna = Visitor(client, private_links(there.store, there.settings)["anna"])
        for _ in range(600):  # more than the server keeps
            idle.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        began = time.monotonic()
        assert anna.enter().status_code == 200
        page = anna.load()
        assert page is not None
        assert anna.say(page, [1, 2, 3]).status_code == 200
        assert time.monotonic() - began < 5  # before the idle ones are cut for their idleness


@contextmanager
def many_files(count: int) -> Iterator[None]:
    """This process holds both ends of each connection, and most systems let a user open 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(count, hard)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("path", ["/judgements", "/nothing"])
def test_f37_a_request_with_two_ends_is_refused(tmp_path: Path, path: str) -> None:
    head = "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with serving(tmp_path) as there:
        port = there.settings.port
        request = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{head}GET /rank HTTP/1.1\r\n\r\n"
        answer = raw(port, request.encode())
    assert answer[9:12] == b"400"
    assert answer.count(b"HTTP/1.1 ") == 1


def test_f37_a_body_that_drips_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.server.limits.BODY_SECONDS", 0.5)
    with serving(tmp_path) as there, httpx.Client() as client:
        anna = Visitor(client, private_links(there.store, there.settings)["anna"])
        anna.enter()
        page = anna.load()
        assert page is not None
        private = Process(None, private_links(there.store, there.settings))  # type: ignore[arg-type]
        head = signed(private, page, "Content-Length: 100\r\nConnection: close")
        answer = raw(there.settings.port, head + b'{"deal": ')
    assert answer[9:12] == b"408"


def test_f37_ten_thousand_deals_are_one(tmp_path: Path) -> None:
    """Who loads a page again and again fills no disk."""
    there = study(tmp_path)
    anna = there.visitor("anna")
    pages_seen = {page.deal for page in (anna.load() for _ in range(50)) if page is not None}
    (deals,) = there.store.database.connection.execute("SELECT COUNT(*) FROM deals").fetchone()
    assert (len(pages_seen), deals) == (1, 1)


# ---- any body --------------------------------------------------------------------------------------------------------


def mutated(draw: random.Random, good: dict[str, Any]) -> bytes:
    """A body near a good one: values of another kind, missing and strange fields, flipped and cut bytes."""
    strange = [None, True, 1, -1e300, "", "\x00", "\U0001f600", [], {}, [[]], [1, 2, 3], "a" * 5000, {"a": 1}, [None]]
    body = dict(good)
    for _ in range(draw.randrange(3)):
        body[draw.choice([*good, "rater", "__proto__", ""])] = draw.choice([*strange, [draw.choice(strange)] * 3])
        if draw.random() < 0.2:
            body.pop(draw.choice(list(body)))
    data = bytearray(json.dumps(body).encode())
    for _ in range(draw.choice([0, 0, 1, 3])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.1 else data)


@pytest.mark.slow
def test_f38_thousands_of_bodies(tmp_path: Path) -> None:
    there = study(tmp_path, tags=["rude"])
    anna = there.visitor("anna")
    page = anna.load()
    assert page is not None
    draw, seen = random.Random(0), set()
    good = {"deal": page.deal, "ranks": [1, 2, 3], "comment": "c", "tags": ["rude"], "seconds": 1.0}
    headers = {"Origin": ADDRESS, "X-Keel-Token": page.csrf, "Content-Type": "application/json"}
    for _ in range(3000):
        answer = anna.client.post(f"{ADDRESS}/judgements", content=mutated(draw, good), headers=headers)
        seen.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        assert list(answer.json()) == (["next"] if answer.status_code == 200 else ["error"])
        assert "Traceback" not in answer.text
    assert {200, 400, 422} <= seen
    assert there.store.num_judgements() == 1
