"""Serve a reward model or a Python reward function over HTTP, for trainers that use it as a scorer.

`keel train` uses it with `rewards: [{url: ...}]`. Requests need a token: the one in the environment variable
KEEL_REWARD_TOKEN, or a new one that is printed. `keel train` sends the token of its KEEL_REWARD_TOKEN; other trainers
may append ?token=... to the address.

example:
  keel serve-reward --model runs/reward/model --port 5000
"""

import os
from typing import Any

from keel.cli.settings import read_command
from keel.config import ServeRewardConfig
from keel.errors import ConfigError, Interrupted


def run(arguments: list[str]) -> dict[str, Any]:
    """Serves until a signal comes; returns where."""
    settings = read_command("serve-reward", ServeRewardConfig, arguments, str(__doc__)).settings
    from keel.rollout.http_scorer import TOKEN
    from keel.server.limits import as_url_host, check_reach, listening, new_token, prompt_server
    from keel.server.reward import PATH, reward_app

    given = os.environ.get(TOKEN)
    if given is not None and len(given) < 16:
        raise ConfigError("a token has at least 16 characters", where=TOKEN, fix="leave it out to get a new one")
    check_reach(settings.host, settings.public)
    token = given or new_token()
    server = prompt_server(reward_app(settings, token), settings.max_waiting + 64)
    with listening(settings.host, settings.port) as place:
        address = f"http://{as_url_host(settings.host)}:{settings.port}{PATH}"
        print(f"serving {address}", flush=True)
        if given is None:
            print(f"{TOKEN}={token}", flush=True)
        try:
            server.run(sockets=[place])
        except (Interrupted, KeyboardInterrupt):
            print("stopped", flush=True)
    return {"address": address}
