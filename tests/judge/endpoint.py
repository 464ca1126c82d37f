"""An OpenAI-compatible server for tests, with a judge of known taste, and faults on request."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from keel.config.judge import RaterJudge, ScorerJudge

Reply = tuple[int, Any, dict[str, str]]  # status, body, headers


def verdict(material: Mapping[str, Any], word: str = "good") -> dict[str, Any]:
    """The taste of the judge: the more often a response has the word, the better it is."""

    def count_good(text: str) -> int:
        return text.split().count(word)

    if "response" in material:
        return {"score": min(10, 1 + count_good(material["response"]))}
    texts = {name.removeprefix("response "): text for name, text in material.items() if name.startswith("response ")}
    counts = {name: count_good(text) for name, text in texts.items()}
    if len(counts) == 2 and "better" in material["asked"]:
        return {"better": "tie" if counts["A"] == counts["B"] else max(counts, key=lambda name: counts[name])}
    levels = sorted(set(counts.values()), reverse=True)
    return {"ranks": {name: levels.index(count) + 1 for name, count in counts.items()}}


def material_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The texts in a question, and under `asked` the form of the verdict."""
    text = body["messages"][0]["content"]
    at = text.index('\n\n{\n "conversation"')
    return {**json.loads(text[at:]), "asked": text[text.index("nothing else:") : at]}


def completion(content: str | None, reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 20}}


class JudgeEndpoint:
    """The server's state: what it was sent, and what it replies."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[Reply] = []  # given in place of the next replies
        self.change: Callable[[dict[str, Any]], Any] = lambda value: value  # of each verdict
        self.takes_schema, self.schema_status = True, 400
        self.seconds = 0.0
        self.word = "good"
        self.url = ""
        self.lock = threading.Lock()

    def reply(self, body: dict[str, Any], key: str | None) -> Reply:
        time.sleep(self.seconds)
        with self.lock:
            self.bodies.append(body)
            self.keys.append(key)
            if self.faults:
                return self.faults.pop(0)
            if "response_format" in body and not self.takes_schema:
                return self.schema_status, {"error": {"message": "response_format is not supported"}}, {}
        value = self.change(verdict(material_of(body), self.word))
        if isinstance(value, dict) and '"reason"' in material_of(body)["asked"]:
            value = {"reason": "by the rubric", **value}
        return 200, completion(value if isinstance(value, str) else json.dumps(value)), {}

    def settings(self, folder: Any, **others: Any) -> ScorerJudge:
        rubric = folder / "rubric.txt"
        if not rubric.exists():
            rubric.write_text("A response is better the more often it has the word good.")
        values = {"url": self.url, "model": "org/critic", "rubric": str(rubric), "cache": str(folder / "cache.sqlite")}
        kind = RaterJudge if "name" in others else ScorerJudge
        return kind.model_validate(values | {"timeout_seconds": 60.0} | others)


@contextmanager
def judge_endpoint() -> Iterator[JudgeEndpoint]:
    state = JudgeEndpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions", self.path
            status, content, headers = state.reply(body, self.headers.get("Authorization"))
            if status == 0:  # the connection breaks
                self.close_connection = True
                return
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            with suppress(OSError):  # the client may have given up
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # of the connections that wait; the judge opens 16 at once
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
