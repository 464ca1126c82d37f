"""A server with the routes of vLLM that keel uses, and keel's sampler inside. It misbehaves on demand.

`Stub` answers in this process. `stub_python` makes an interpreter whose module vllm is this server.
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from keel.data.prompts import Prompt
from keel.models.loading import load_causal_lm, load_tokenizer
from keel.rollout.sampler import sample_rollouts
from keel.rollout.vllm.client import EngineClient
from keel.rollout.vllm.folder import EngineFolder
from keel.rollout.vllm.server import ServerSettings

FAULTS = "KEEL_STUB_FAULTS"
"""Environment variable of the file that names the faults of a stub in a process of its own."""


@dataclass
class Weights:
    """The model of a stub, and what it remembers of its life."""

    folder: Path
    dtype: str = "float32"
    version: str = "default"
    updates: int = 0
    paused: bool = False
    first_read: dict[tuple[int, ...], Any] = field(default_factory=dict)  # prompt -> the model that first read it
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model: Any = load_causal_lm(str(self.folder), self.dtype)
        self.tokenizer = load_tokenizer(str(self.folder))


class App:
    def __init__(self, weights: Weights, faults: Callable[[], set[str]]) -> None:
        self.weights, self.faults, self.lock = weights, faults, threading.Lock()
        post = ("pause", "resume", "collective_rpc", "update_weight_version", "reset_prefix_cache", "sleep", "wake_up")
        self.app = Starlette(
            routes=[
                Route("/health", lambda _: Response(status_code=503 if self.has("sick") else 200)),
                Route("/version", lambda _: JSONResponse({"version": "0.33.1" if self.has("version") else "0.32.0"})),
                Route("/weight_info", self.weight_info),
                Route("/v1/completions", self.complete, methods=["POST"]),
                *(Route(f"/{name}", self.control, methods=["POST"]) for name in post),
            ]
        )

    def has(self, fault: str) -> bool:
        return fault in self.faults()

    def weight_info(self, _: Request) -> Response:
        return JSONResponse({"weight_version": "other-1" if self.has("other_server") else self.weights.version})

    async def control(self, request: Request) -> Response:
        name = request.url.path[1:]
        body = await request.json() if await request.body() else {}
        self.weights.log.append(name + (f"?{request.url.query}" if name in ("sleep", "wake_up") else ""))
        if name == "collective_rpc":
            return await run_in_threadpool(self.reload, Path(body["kwargs"]["weights_path"]))
        if name == "update_weight_version":
            self.weights.version = body["new_version"]
        if name == "reset_prefix_cache":
            if not self.has("prefix_cache"):
                self.weights.first_read.clear()
            return JSONResponse({"success": not self.has("cache_held")})
        self.weights.paused = {"pause": True, "resume": False}.get(name, self.weights.paused)
        return JSONResponse({})

    def reload(self, folder: Path) -> Response:
        weights = self.weights
        weights.updates += 1
        if self.has("refuse") or (self.has("refuse_once") and weights.updates == 2):
            return JSONResponse({"error": {"message": ""}}, status_code=500)
        if self.has("stale") or (self.has("stale_second") and weights.updates > 2):
            return JSONResponse({"results": [None]})
        model = load_causal_lm(str(folder), weights.dtype)
        new, old = model.state_dict(), weights.model.state_dict()
        last = f".{model.config.num_hidden_layers - 1}."
        for name in new:
            kept = (self.has("half") and last in name) or (self.has("head") and name.startswith("lm_head"))
            if kept and weights.updates > 1:
                new[name].copy_(old[name])
        weights.model = model
        return JSONResponse({"results": [None]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        if self.has("hang"):
            await asyncio.sleep(60)
        if self.has("die"):
            os._exit(9)
        if self.has("nan"):
            what = "Out of range float values are not JSON compliant: nan"
            return JSONResponse({"error": {"message": what, "code": 400}}, status_code=400)
        if self.has("no_json"):
            return Response("<html>")
        return JSONResponse(await run_in_threadpool(self.respond, body))

    def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)
        read = (body["prompt"][1:] or [4]) if self.has("cut_prompt") else body["prompt"]
        tokens = tuple(read)
        with self.lock:  # the model is not made for several threads
            model = self.weights.first_read.setdefault(tokens, self.weights.model)
            tokens, logprobs, cut = self.sample(model, tokens, body)
        choice = {
            "token_ids": tokens,
            "prompt_token_ids": read,
            "logprobs": {"token_logprobs": logprobs},
            "finish_reason": "length" if cut else "stop",
        }
        return {"choices": [self.twist(choice)]}

    def sample(self, model: Any, tokens: tuple[int, ...], body: dict[str, Any]) -> tuple[list[int], list[float], bool]:
        seed = int.from_bytes(os.urandom(4), "little") if self.has("seedless") else body["seed"]
        limit = max(1, body["max_tokens"] // 2) if self.has("short") else body["max_tokens"]
        uniforms = torch.rand((1, limit), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rollouts = sample_rollouts(
            model,
            [Prompt("", "", tokens, {})],
            self.weights.tokenizer,
            uniforms,
            body["stop_token_ids"],
            body["temperature"] * (1.3 if self.has("hot") else 1.0),
            top_k=3 if self.has("top_k") else body["top_k"],
            top_p=body["top_p"],
        )
        return rollouts.response_tokens[0].tolist(), rollouts.logprobs[0].tolist(), bool(rollouts.truncated[0])

    def twist(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The lies about a response that was sampled as it should be."""
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if self.has("no_logprob"):
            logprobs.pop()
        if self.has("null_logprob"):
            logprobs[0] = None
        if self.has("beyond"):
            tokens[0] = 10_000
        if self.has("wrong_end"):
            choice["finish_reason"] = "length" if choice["finish_reason"] == "stop" else "stop"
        if self.has("jitter"):
            noise = torch.randn(len(logprobs)).tolist()
            choice["logprobs"]["token_logprobs"] = [
                min(0.0, lp + 1e-6 * n) for lp, n in zip(logprobs, noise, strict=True)
            ]
        if self.has("no_tokens"):
            del choice["token_ids"]
        return choice


class ThreadServer:
    """Replaces `keel.rollout.vllm.server.Server`: the stub in a thread, with the real client and folder."""

    faults: set[str] = set()
    instances: list["ThreadServer"] = []

    def __init__(self, settings: ServerSettings, folder: EngineFolder, model: Path) -> None:
        self.settings, self.folder = settings, folder
        self.weights = Weights(model, settings.dtype)
        config = uvicorn.Config(
            App(self.weights, lambda: ThreadServer.faults).app,
            uds=str(folder.socket),
            log_level="error",
            lifespan="off",
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        self.client = EngineClient(folder.socket, settings.timeout_seconds, self.require_alive)
        while not self.client.is_healthy():
            time.sleep(0.01)
        ThreadServer.instances.append(self)

    def require_alive(self) -> None:
        assert self._thread.is_alive()

    @property
    def is_closed(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(5)
        self.folder.delete()


MODULE = """
import os, pathlib, runpy, sys, time
for fault in pathlib.Path(os.environ["{variable}"]).read_text().split():
    if fault.startswith("exit:"):
        sys.exit(fault.removeprefix("exit:").replace("_", " "))
    if fault == "never_ready":
        time.sleep(600)
runpy.run_path("{stub}", run_name="__main__")
"""
WRAPPER = """#!/bin/sh
export PYTHONPATH="{path}"
export {variable}="{faults}"
exec "{python}" "$@"
"""


def stub_python(folder: Path, faults: str = "") -> Path:
    """Make an interpreter whose module vllm is the stub; `folder / "faults"` names its faults, and may change."""
    module = folder / "site" / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True, exist_ok=True)
    (module / "api_server.py").write_text(MODULE.format(stub=Path(__file__), variable=FAULTS))
    (folder / "faults").write_text(faults)
    wrapper = folder / "python"
    source = Path(sys.modules["keel"].__file__ or "").parents[1]
    wrapper.write_text(
        WRAPPER.format(
            path=f"{folder / 'site'}:{source}", variable=FAULTS, faults=folder / "faults", python=sys.executable
        )
    )
    wrapper.chmod(0o755)
    return wrapper


def main() -> None:
    options = dict(zip(sys.argv[1::1], sys.argv[2::1], strict=False))
    path = Path(os.environ[FAULTS])

    def faults() -> set[str]:
        with suppress(OSError):
            return {"process", *path.read_text().split()}
        return {"process"}

    torch.set_num_threads(1)
    path.with_name("started").write_text(json.dumps({"pid": os.getpid(), "environment": dict(os.environ)}))
    if "worker" in faults():  # as the processes that vLLM starts: in the group of the server, without its pipe
        worker = os.fork()
        if worker == 0:
            time.sleep(600)
            os._exit(0)
        path.with_name("worker").write_text(str(worker))
    weights = Weights(Path(options["--model"]), options["--dtype"])
    uvicorn.run(App(weights, faults).app, uds=options["--uds"], log_level="error", lifespan="off")


if __name__ == "__main__":
    main()
