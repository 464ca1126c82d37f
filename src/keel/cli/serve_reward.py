"""Serve a reward model or a Python reward function over HTTP, for trainers that name it by `rewards: [{url: ...}]`.

A token guards it: the one in the environment variable KEEL_REWARD_TOKEN, or a new one that is printed. `keel train`
sends the token in its own KEEL_REWARD_TOKEN; other trainers may append ?token=... to the address.

example:
  keel serve-reward --model runs/reward/model --port 5000
"""

import os
import socket
from typing import Any

from keel.cli.settings import read_command
from keel.config import ServeRewardConfig
from keel.errors import ConfigError, Interrupted


def run(arguments: list[str]) -> dict[str, Any]:
    """Serves until a signal comes; returns where."""
    settings = read_command("serve-reward", ServeRewardConfig, arguments, str(__doc__)).settings
    import uvicorn

    from keel.rollout.http import TOKEN
    from keel.server.limits import LOCAL, PromptProtocol, new_token
    from keel.server.reward import PATH, reward_app

    given = os.environ.get(TOKEN)
    if given is not None and len(given) < 16:
        raise ConfigError("a token has at least 16 characters", where=TOKEN, fix="leave it out to get a new one")
    if settings.host not in LOCAL and not settings.public:
        raise ConfigError(f"{settings.host} can be reached from other machines", where="host", fix="add --public true")
    token = given or new_token()
    app = reward_app(settings, token)
    server = uvicorn.Config(
        app,
        http=PromptProtocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_waiting + 64,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    with listening(settings.host, settings.port) as place:
        address = f"http://{settings.host}:{settings.port}{PATH}"
        print(f"serving {address}", flush=True)
        if given is None:
            print(f"{TOKEN}={token}", flush=True)
        try:
            uvicorn.Server(server).run(sockets=[place])
        except (Interrupted, KeyboardInterrupt):
            print("stopped", flush=True)
    return {"address": address}


def listening(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises ConfigError when it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror}", where="port", fix="choose another"
        ) from error
