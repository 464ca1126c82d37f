"""F-24, F-30 to F-34 and F-37 for `keel serve`: torn and huge files, and everybody but who holds the private link."""

import json
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml

from keel.run.metrics_log import JsonlMetrics
from keel.run.rollout_log import RolloutLog
from keel.server.request_checks import HEADERS
from keel.web import pages
from keel.web.dashboard.views import VIEWS

from ..web.board import TOKEN, Board, Process, WrittenRun, answer, serving
from ..web.visits import PORT, raw
from .flooding import all_at_once, are_cut_off, p95
from .payloads import HOSTS, PAYLOADS, TRAVERSALS
from .test_pages import Structure

CANARY = "canary-" + "51c2"


def routes(run: WrittenRun) -> list[str]:
    """Everything that can be asked for, about a run."""
    views = [path.replace("{run}", run.name) for path in VIEWS]
    return ["/", "/enter", f"/run/{run.name}", "/compare", "/static/style.css", *views]


def asked(run: WrittenRun, other: WrittenRun | None = None) -> dict[str, str]:
    return {"of": run.name, "with": (other or run).name, "at": "0", "there": "0"}


# ---- F-24: files that are torn, broken or long -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_f24_a_file_torn_anywhere_shows_its_last_whole_line(tmp_path: Path, name: str) -> None:
    run = WrittenRun(tmp_path / "a").go_on(5, answers=0).end()
    short = {name: answer(1, 1)[name] for name in ("score", "kl", "length", "truncated", "scores")}
    for step in range(1, 6):
        RolloutLog(run.path / "rollouts.jsonl").log(step, [short | {"prompt": "p", "response": "r", "tokens": []}])
    path, board = run.path / name, Board.of(tmp_path)
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    torn = 0
    for size in range(ends[1], len(whole) + 1):
        path.write_bytes(whole[:size])
        lines = sum(end <= size for end in ends)
        answers, state = board.answers(run), board.state(run)
        shown = state["step"] if name == "metrics.jsonl" else answers["total"]
        said = [f"the last line of {name} is incomplete"] if size not in ends else []
        assert (shown, state["incomplete"]) == (lines, said), size
        torn += bool(said)
    assert torn == len(whole) - ends[1] - 3


def test_f24_a_line_in_the_making_is_no_news_while_the_run_goes_on(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(2)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "objec')
    assert Board.of(tmp_path).state(run)["incomplete"] == []


def test_f24_what_is_no_number_is_a_gap(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(1)
    with (run.path / "metrics.jsonl").open("a") as file:
        for step, value in enumerate(
            ("NaN", "Infinity", "-Infinity", "null", "1e999", '"2"', "[1]", "true", "1" * 400), 2
        ):
            file.write(f'{{"step": {step}, "objective/scores": {value}}}\n')
        file.write('{"step": 11, "objective/scores": 0.5}\n')
    state = Board.of(tmp_path).state(run)
    (curve,) = [
        curve for group in state["groups"] for curve in group["curves"] if curve["figure"] == "objective/scores"
    ]
    assert curve["steps"] == list(range(1, 12))
    assert curve["values"] == [0.1, None, None, None, None, None, None, None, 1.0, None, 0.5]


def test_f24_lines_that_are_broken_are_counted_and_passed_over(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(2).end()
    broken = [
        b"",
        b"nonsense",
        b"[]",
        b'{"objective/scores": 1}',
        b'{"step": "x"}',
        b'{"step": 1e400}',
        b'{"step": -1}',
        b'{"step": true}',
        b"\xff\x00",
        b"[" * 9**5,
    ]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (run.path / name).open("ab") as file:
            file.write(b"\n".join(broken) + b"\n")
    run.go_on(1)
    board = Board.of(tmp_path)
    assert board.answers(run)["total"] == 12
    state = board.state(run)
    assert state["step"] == 3
    assert state["incomplete"] == [f"10 broken lines in {name} skipped" for name in ("metrics.jsonl", "rollouts.jsonl")]


@pytest.mark.slow
def test_f24_a_million_lines_are_shown_and_nobody_waits(tmp_path: Path) -> None:
    run, other = WrittenRun(tmp_path / "long", steps=10**6).end(), WrittenRun(tmp_path / "short").go_on(3)
    with (run.path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {i}, "objective/scores": {i % 7}}}\n' for i in range(1, 10**6 + 1))
    with (run.path / "rollouts.jsonl").open("w") as file:
        line = json.dumps({"step": 1, **answer(1, 1)}) + "\n"
        file.writelines(line for _ in range(100_000))
    times: list[float] = []
    with Process.start(tmp_path) as server, server.visitor() as reader, another_visitor(server, other, times):
        began, state, read = time.monotonic(), {"is_whole": False}, 0.0
        while not state["is_whole"] or read < 1:
            state = reader.get(f"/run/{run.name}/state.json").json()
            read = reader.get(f"/run/{run.name}/answers.json").json()["read"]
        took = time.monotonic() - began
    (curve,) = [curve for group in state["groups"] for curve in group["curves"]]
    assert (state["step"], len(curve["steps"]) <= 601) == (10**6, True)
    print(f"1,000,000 lines of figures and 100,000 answers in {took:.1f} s; p95 of another visitor {p95(times):.3f} s")
    assert took < 120
    assert p95(times) < 1.0


# ---- F-30: paths -----------------------------------------------------------------------------------------------------

INTO = ["/run/", "/run/{run}/", "/static/", "/", "/enter/", "/compare/", "/run/{run}/state.json/"]
NAMED = ["/run/{run}/answers.json?run=", "/compare?of={run}&with=", "/compare/prompts.json?of={run}&with="]


def test_f30_no_path_and_no_name_leads_out_of_the_found_runs(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "runs" / "a").go_on(2)
    outside = WrittenRun(tmp_path / "outside", note=CANARY).go_on(1)
    canary = tmp_path / "canary.txt"
    canary.write_text(CANARY)
    words = {"inside": str(canary)[1:], "absolute": str(canary), "link": os.path.relpath(canary, pages.HERE / "static")}
    hits, sent = [], 0
    with serving(tmp_path / "runs") as (port, cookie):
        head = f"Host: 127.0.0.1:{port}\r\nCookie: {cookie}\r\nConnection: close"
        for route in INTO + NAMED:
            for text in [*TRAVERSALS, "../outside", outside.name, str(outside.path), "%2e%2e%2foutside"]:
                path = (route.format(run=run.name) + text.format(**words)).replace(" ", "%20")
                reply = raw(port, f"GET {path} HTTP/1.1\r\n{head}\r\n\r\n".encode())
                status = int(reply.split(b" ", 2)[1])
                refused = status in (400, 404, 405) or is_known(path, run, status)
                if CANARY.encode() in reply or b"from starlette" in reply or b"{%" in reply or not refused:
                    hits.append((path, status))
                sent += 1
    assert sent == len(INTO + NAMED) * (len(TRAVERSALS) + 4)
    assert hits == []


def is_known(path: str, run: WrittenRun, status: int) -> bool:
    """What leads to a page all the same: a query says nothing of which run, and a fragment nothing of which file."""
    known = (f"/run/{run.name}/answers.json?run=", "/static/rank.js#", "/static/rank.js?", "/?", "/#")
    return status == 200 and (path.startswith(known) or path == "/")


def test_f30_links_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    outside = WrittenRun(tmp_path / "outside", note=CANARY).go_on(2)
    root = tmp_path / "runs"
    good = WrittenRun(root / "good").go_on(1)
    (root / "linked").symlink_to(outside.path)
    for name in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "ended.json"):
        run = WrittenRun(root / f"by {name}").go_on(1)
        (run.path / name).unlink(missing_ok=True)
        target = tmp_path / f"secret {name}"
        target.write_text(f'{{"step": 7, "standing": "{CANARY}", "what": "{CANARY}", "{CANARY}": 1}}\n')
        (run.path / name).symlink_to(target)
    board = Board.of(root)
    runs = board.runs()
    assert sorted(runs) == ["by config.yaml", "by ended.json", "by metrics.jsonl", "by rollouts.jsonl", "good"]
    assert {title for title, run in runs.items() if run["standing"] == "unreadable"} == set(runs) - {"good"}
    said = [board.client.get("/runs.json").text]
    for run in runs.values():
        for path in VIEWS:
            values = {"of": run["name"], "with": good.name, "at": 0, "there": 0}
            said.append(board.client.get(path.replace("{run}", run["name"]), params=values).text)
    assert not any(CANARY in text for text in said)


def test_f30_a_link_put_in_later_is_not_followed_either(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "runs" / "a").go_on(2)
    board = Board.of(tmp_path / "runs")
    assert board.answers(run)["total"] == 8
    secret = tmp_path / "secret.jsonl"
    secret.write_text(json.dumps({"step": 1, **answer(1, 1, response=CANARY)}) + "\n")
    (run.path / "rollouts.jsonl").unlink()
    (run.path / "rollouts.jsonl").symlink_to(secret)
    for path in VIEWS:
        assert CANARY not in board.client.get(path.replace("{run}", run.name), params=asked(run)).text
    assert board.state(run)["standing"] == "unreadable"


# ---- F-31: scripts ---------------------------------------------------------------------------------------------------


def hostile(folder: Path, text: str, more: str = "") -> WrittenRun:
    """A run in which everything that is text is this text; its folder has what of it can be a name, and more."""
    name = re.sub(r"[/\x00]", "|", text)[:80] + more
    run = WrittenRun(folder / name, note=text, **{text: text})
    (run.path / "config.yaml").write_text(
        yaml.safe_dump({"steps": 5, "rollout": {}, "rewards": [{"function": text}], text: text})
    )
    JsonlMetrics(run.path / "metrics.jsonl").log(1, {text: 1.0, f"rewards/{text}": 2.0, "objective/scores": 1.0})
    rows = [
        answer(1, i, prompt=text, response=f"{text} {i}{more}", pieces=[text] * 5, scores={text: float(i), "b": -i})
        for i in (1, 2)
    ]
    RolloutLog(run.path / "rollouts.jsonl").log(1, rows)
    return run.end("failed", text)


@pytest.mark.slow
def test_f31_text_never_becomes_a_part_of_a_page(tmp_path: Path) -> None:
    plain = {
        name: Structure(page.text).tags
        for name, page in everything(tmp_path / "plain", "text").items()
        if is_page(page)
    }
    hits, looked = [], 0
    for number, payload in enumerate(PAYLOADS):
        for name, reply in everything(tmp_path / str(number), payload).items():
            kind = reply.headers["content-type"].partition(";")[0]
            if HEADERS.items() - {k.title(): v for k, v in reply.headers.items()}.items():
                hits.append((payload, name, "headers"))
            if is_page(reply) and Structure(reply.text).tags != plain[name]:
                hits.append((payload, name, "structure"))
            if not is_page(reply) and kind not in ("application/json", "application/x-ndjson"):
                hits.append((payload, name, kind))
            looked += 1
    assert looked == len(PAYLOADS) * (len(VIEWS) + 4)
    assert len(plain) == 4
    assert hits == []


def is_page(reply: httpx.Response) -> bool:
    return reply.headers["content-type"].startswith("text/html")


def everything(folder: Path, text: str) -> dict[str, httpx.Response]:
    run, other = hostile(folder, text), hostile(folder, text, " too")
    board = Board.of(folder)
    values = asked(run, other)
    found = {path: board.client.get(path.replace("{run}", run.name), params=values) for path in VIEWS}
    assert {reply.status_code for reply in found.values()} <= {200}, {
        k: v.text for k, v in found.items() if v.status_code != 200
    }
    found |= {path: board.client.get(path, params=values) for path in ("/", "/compare")}
    found["/run"] = board.client.get(f"/run/{run.name}")
    found["no page"] = board.client.get("/" + re.sub(r"[\x00#?]", "", text))
    return found


# ---- F-32: nothing can be changed ------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def test_f32_whatever_is_sent_the_folder_stays_as_it_is(tmp_path: Path) -> None:
    run, other = WrittenRun(tmp_path / "a").go_on(3), WrittenRun(tmp_path / "b").go_on(1, answers=0)
    RolloutLog(other.path / "rollouts.jsonl").log(1, [answer(1, i, response=f"other {i}") for i in range(4)])
    for path in tmp_path.rglob("*"):
        path.chmod(0o500 if path.is_dir() else 0o400)
    before, board = contents(tmp_path), Board.of(tmp_path)
    seen: dict[str, set[int]] = {}
    for path in routes(run):
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
            reply = board.client.request(method, path, params=asked(run, other) | {"token": TOKEN}, json={})
            seen.setdefault(method, set()).add(reply.status_code)
            assert "access-control-allow-origin" not in reply.headers
    assert seen.pop("GET") == seen.pop("HEAD") == {200}
    assert set.union(*seen.values()) == {405}
    assert contents(tmp_path) == before


# ---- F-33: names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_f33_only_under_its_own_name(tmp_path: Path, host: str) -> None:
    run = WrittenRun(tmp_path / "a").go_on(1)
    board = Board.of(tmp_path)
    for path in routes(run):
        assert board.client.get(path, params=asked(run), headers={"Host": host}).status_code == 400


def test_f33_its_own_names(tmp_path: Path) -> None:
    board = Board.of(tmp_path, host="0.0.0.0", names=["Box"], public=True)
    hosts = [f"LOCALHOST:{PORT}", f"[::1]:{PORT}", f"127.0.0.1:{PORT}", f"BOX:{PORT}"]
    assert [board.client.get("/runs.json", headers={"Host": host}).status_code for host in hosts] == [200] * 4


# ---- F-34: who may ---------------------------------------------------------------------------------------------------


def test_f34_the_token_cannot_be_guessed(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(1)
    board = Board.of(tmp_path)
    guesses = ["", "t", TOKEN[:-1], TOKEN + "t", TOKEN.upper(), f".{TOKEN}", f"x.{TOKEN}", "*", "null", "☃"]
    guesses += [secrets.token_urlsafe(24) for _ in range(50)]
    for guess in guesses:
        client = board.stranger()
        assert client.get("/enter", params={"token": guess}).status_code == 404
        cookie = f"keel-owner-{PORT}={guess}; keel-{PORT}={TOKEN}; keel-owner-{PORT + 1}={TOKEN}".encode()
        for path in ("/", "/runs.json", f"/run/{run.name}/answers.json"):
            assert client.get(path, params=asked(run) | {"token": TOKEN}, headers={"Cookie": cookie}).status_code == 401


@pytest.mark.slow
def test_f34_the_token_is_new_each_time_and_nowhere_but_in_the_link(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(2)
    tokens = set()
    for _ in range(2):
        with Process.start(tmp_path) as server:
            token = server.link.partition("token=")[2]
            tokens.add(token)
            with server.visitor() as client:
                said = [client.get(path, params=asked(run)).text for path in routes(run) if path != "/enter"]
                said.append(client.get(server.link).text)
                said.append(client.get("/none").text)
            raw(server.port, f"GET /enter?token={token} HTTP/9.9\r\nHost: x\r\n\r\n".encode())
            code, out, err = server.stop()
        assert code == 0
        assert not any(token in text for text in [*said, out, err])
    assert len(tokens) == 2
    assert {len(token) for token in tokens} == {32}  # 192 bits


# ---- F-37: floods ----------------------------------------------------------------------------------------------------


@contextmanager
def another_visitor(server: Process, run: WrittenRun, times: list[float]) -> Iterator[None]:
    """Somebody who goes on reading; what each of their requests took is noted."""
    stop = threading.Event()

    def work() -> None:
        with server.visitor() as client:
            while not stop.is_set():
                for path in ("/runs.json", f"/run/{run.name}/state.json", f"/run/{run.name}/answers.json"):
                    began = time.monotonic()
                    assert client.get(path).status_code == 200
                    times.append(time.monotonic() - began)
                time.sleep(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[tuple[Process, WrittenRun]]:
    """A server of a run with many answers, which takes time to search."""
    run = WrittenRun(tmp_path / "a").go_on(50, answers=600)
    with Process.start(tmp_path) as server:
        yield server, run


@pytest.mark.slow
def test_f37_others_go_on_while_one_visit_floods(crowded: tuple[Process, WrittenRun]) -> None:
    server, run = crowded
    times: list[float] = []
    statuses: list[int] = []
    with server.visitor() as client:
        strangers = httpx.Client(base_url=server.address, timeout=30, limits=httpx.Limits(max_connections=250))

        def flood(number: int) -> None:
            path = f"/run/{run.name}/answers.json"
            statuses.append(client.get(path, params={"text": f"item {number}", "sort": "disagreement"}).status_code)
            statuses.append(strangers.get(path).status_code)

        with another_visitor(server, run, times):
            time.sleep(1)
            calm = len(times)
            all_at_once([partial(flood, number) for number in range(200)])
            headers = b"".join(b"X-H%d: y\r\n" % i for i in range(10_000))
            for big in (b"GET / HTTP/1.1\r\n" + headers + b"\r\n", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n"):
                assert raw(server.port, big)[9:12] in (b"400", b"414", b"431", b"")
        strangers.close()
    assert len(statuses) == 400
    assert set(statuses) <= {200, 401, 503}
    assert statuses.count(401) == 200
    assert len(times) > calm + 10
    print(
        f"p95 of another visitor: {p95(times):.3f} s over {len(times)} requests; {statuses.count(503)} of 200 sent away"
    )
    assert p95(times) < 1.0


@pytest.mark.slow
def test_f37_slow_clients_are_cut_off_and_nobody_notices(crowded: tuple[Process, WrittenRun]) -> None:
    server, run = crowded
    times: list[float] = []
    heads = [b"", b"GET /runs.json HTTP/1.1\r\nHost: ", b"GET / HTTP/1.1\r\nX: " + b"y" * 1000]
    with another_visitor(server, run, times):
        assert are_cut_off(server.port, [heads[number % 3] for number in range(150)])
    assert p95(times) < 1.0


def test_f37_any_question_gets_an_answer(tmp_path: Path) -> None:
    """Values of every kind for every name: 200, or a word on what is wrong with it."""
    run = WrittenRun(tmp_path / "a").go_on(2)
    board, draw, seen = Board.of(tmp_path), random.Random(0), set()
    names = ["since", "version", "offset", "until", "at", "there", "most", "by", "text", "sort", "order", "truncated"]
    names += [f"{name}_{end}" for name in ("score", "kl", "length", "step") for end in ("from", "to")]
    strange = ["", "-1", "0", "1e400", "1e15", "nan", "9" * 400, "x" * 600, "\x00", "\U0001f600", "☃", "[]", "true"]
    for _ in range(300):
        path, values = draw.choice(list(VIEWS)), {draw.choice(names): draw.choice(strange) for _ in range(2)}
        reply = board.client.get(path.replace("{run}", run.name), params=asked(run) | values)
        seen.add(reply.status_code)
        assert reply.status_code in (200, 400, 404), (path, values, reply.text)
        assert "Traceback" not in reply.text
    assert seen == {200, 400, 404}


def test_f37_a_failure_is_explained_in_the_terminal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(VIEWS, "/runs.json", lambda *_: {}[CANARY])
    with serving(tmp_path) as (port, cookie):
        head = f"Host: 127.0.0.1:{port}\r\nCookie: {cookie}\r\nConnection: close"
        reply = raw(port, f"GET /runs.json HTTP/1.1\r\n{head}\r\n\r\n".encode())
    assert reply.startswith(b"HTTP/1.1 500")
    assert reply.endswith(b'{"error":"keel failed. The reason is printed in its terminal."}')
    printed = capfd.readouterr().err
    assert f"KeyError: '{CANARY}'" in printed
    assert __file__ in printed
