"""Run folders as runs write them, and a dashboard over them, visited as a browser would."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import yaml
from starlette.testclient import TestClient

from keel.config import ServeConfig
from keel.run.metrics_log import JsonlMetrics
from keel.run.rollout_log import RolloutLog
from keel.server.limits import prompt_server
from keel.web.dashboard.app import dashboard_app
from keel.web.dashboard.folder import run_name

from .visits import PORT, free_port

ADDRESS = f"http://127.0.0.1:{PORT}"
TOKEN = "t" * 32


def answer(step: int, number: int, prompts: int = 3, **more: Any) -> dict[str, Any]:
    """A row of rollouts.jsonl; `judge` says the opposite of `model`."""
    score = round((number % 5) / 4 + step / 100, 4)
    pieces = [" we", " send", f" item {number}", ".", "</s>"]
    return {
        "score": score,
        "kl": step / 10,
        "length": len(pieces),
        "truncated": number % 4 == 3,
        "scores": {"model": score, "judge": -score},
        "prompt": f"question {number % prompts}",
        "response": "".join(pieces[:-1]),
        "tokens": [1, 2, 3, 4, 0],
        "pieces": pieces,
        "logprobs": [-0.5, -1.0, -1.5, -0.25, -0.125],
        "ref_logprobs": [-0.5, -1.5, -1.0, -0.25, -0.125],
        "values": [0.1, 0.2, 0.3, 0.4, 0.5],
        "rewards": [0.0, -0.01, 0.01, 0.0, score],
        "advantages": [-0.2, -0.1, 0.0, 0.1, 0.2],
        "ratio": [1.0, 1.5, 0.5, 1.0, 1.0],
        **more,
    }


class WrittenRun:
    """A run folder, and the run that writes to it."""

    def __init__(self, path: Path, steps: int = 20, **settings: Any) -> None:
        path.mkdir(parents=True)
        self.path, self.done = path, 0
        told = {"output": str(path), "seed": 0, "steps": steps, "rollout": {"batch_size": 4}, **settings}
        (path / "config.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
        self.hold(os.getpid())

    @property
    def name(self) -> str:
        """As the pages call it, when the folder above is served."""
        return run_name(self.path, self.path.parent)

    def hold(self, process: int) -> None:
        (self.path / ".lock").write_text(f"process {process} since 2026-01-01 00:00:00")

    def figures(self, step: int) -> dict[str, float]:
        return {"objective/scores": step / 10, "objective/kl": step / 5, "response/length": 20.0 - step / 10}

    def go_on(self, steps: int = 1, answers: int = 4, **more: float) -> "WrittenRun":
        for _ in range(steps):
            self.done += 1
            JsonlMetrics(self.path / "metrics.jsonl").log(self.done, self.figures(self.done) | more)
            rows = [answer(self.done, answers * self.done + i) for i in range(answers)]
            RolloutLog(self.path / "rollouts.jsonl").log(self.done, rows)
        return self

    def end(self, standing: str = "finished", what: str = "") -> "WrittenRun":
        (self.path / "ended.json").write_text(json.dumps({"standing": standing, "what": what}))
        return self


@dataclass
class Board:
    """A dashboard without a socket."""

    app: Any
    client: TestClient

    @classmethod
    def of(cls, folder: Path, **settings: Any) -> "Board":
        config = ServeConfig(**{"folder": str(folder), "port": PORT, **settings})
        app = dashboard_app(config, TOKEN)
        board = cls(app, TestClient(app, ADDRESS, follow_redirects=False))
        assert board.client.get("/enter", params={"token": TOKEN}).status_code == 200
        return board

    def stranger(self) -> TestClient:
        return TestClient(self.app, ADDRESS, follow_redirects=False)

    def get(self, path: str, **asked: Any) -> Any:
        answer = self.client.get(path, params=asked)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def runs(self) -> dict[str, dict[str, Any]]:
        """By title, when everything has been read."""
        found = self.get("/runs.json")["runs"]
        while not all(run["known"] for run in found):
            found = self.get("/runs.json")["runs"]
        return {run["title"]: run for run in found}

    def state(self, run: WrittenRun, **asked: Any) -> Any:
        """When the doctor has looked at it."""
        found = self.get(f"/run/{run.name}/state.json", **asked)
        while not found["known"]:
            time.sleep(0.01)
            found = self.get(f"/run/{run.name}/state.json", **asked)
        return found

    def answers(self, run: WrittenRun, **asked: Any) -> Any:
        return self.get(f"/run/{run.name}/answers.json", **asked)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, str]]:
    """A dashboard at a free port, served by a thread of this process; gives port and cookie."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
        server = prompt_server(dashboard_app(ServeConfig(folder=str(folder), port=port), TOKEN), 512)
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        yield port, f"keel-owner-{port}={TOKEN}.visit"
        server.should_exit = True
        thread.join(10)


@dataclass
class Process:
    """`keel serve` as a user starts it."""

    child: "subprocess.Popen[str]"
    link: str
    stderr: IO[bytes]  # a file: a pipe that nobody reads would fill, and stop the server

    @classmethod
    def start(cls, folder: Path) -> "Process":
        """Returns when it answers."""
        port = free_port()
        command = [sys.executable, "-m", "keel.cli.main", "serve", str(folder), f"--port={port}"]
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop or __exit__
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert child.stdout is not None
        line = child.stdout.readline()
        link = re.search(r"http\S+", line)
        assert link, (line, child.communicate(), printed(stderr))
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return cls(child, link[0], stderr)
            except OSError:
                time.sleep(0.02)
        raise AssertionError("it does not listen")

    @property
    def address(self) -> str:
        return self.link[: self.link.index("/enter")]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @contextmanager
    def visitor(self) -> Iterator[httpx.Client]:
        """A browser that has followed the link. A request fails if the server does, with what the server printed."""
        limits, hooks = httpx.Limits(max_connections=250), {"response": [self._check]}
        with httpx.Client(base_url=self.address, timeout=30, limits=limits, event_hooks=hooks) as client:
            assert client.get(self.link).status_code == 200
            yield client

    def _check(self, reply: httpx.Response) -> None:
        if reply.status_code == 500:
            time.sleep(1)  # the server prints the traceback after it has replied
            raise AssertionError(f"{reply.url}: {reply.read().decode()}\n{printed(self.stderr)}")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.communicate()
        self.stderr.close()

    def stop(self) -> tuple[int, str, str]:
        """Ctrl-C: exit code, and what was said."""
        self.child.send_signal(signal.SIGINT)
        out, _ = self.child.communicate(timeout=30)
        err = printed(self.stderr)
        self.stderr.close()
        return self.child.returncode, out, err


def printed(file: IO[bytes]) -> str:
    """What a child has printed to a file. The position, which the child shares, does not move."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()
