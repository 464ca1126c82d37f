"""Serve a reward model or a Python reward function over HTTP, for trainers that use it as a scorer.

`keel train` uses it with `rewards: [{url: ...}]`. Requests need a token: the one in the environment variable
KEEL_REWARD_TOKEN, or a new one that is printed. `keel train` sends the token of its KEEL_REWARD_TOKEN; other trainers
may append ?token=... to the address.

example:
  keel serve-reward --model runs/reward/model --port 5000
"""

import os
from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.config import ServeRewardConfig
from keel.errors import ConfigError, Interrupted

VERB = Verb("serve-reward", ServeRewardConfig, str(__doc__))
MIN_TOKEN_CHARACTERS = 16
# A request beyond `max_waiting` still needs a connection, on which it gets a 503 with Retry-After.
CONNECTIONS_BEYOND_QUEUE = 64


def run(arguments: list[str]) -> dict[str, Any]:
    """Serve the scorer until a signal comes, and return its address."""
    settings = read_command(VERB, arguments).settings
    from keel.rollout.http_scorer import TOKEN
    from keel.server.limits import as_url_host, check_reach, listening, new_token, prompt_server
    from keel.server.reward import PATH, reward_app

    chosen_token = os.environ.get(TOKEN)
    if chosen_token is not None and len(chosen_token) < MIN_TOKEN_CHARACTERS:
        raise ConfigError(
            f"a token needs at least {MIN_TOKEN_CHARACTERS} characters", where=TOKEN, fix="unset it to get a new one"
        )
    check_reach(settings.host, settings.public)
    token = chosen_token or new_token()
    server = prompt_server(reward_app(settings, token), settings.max_waiting + CONNECTIONS_BEYOND_QUEUE)
    with listening(settings.host, settings.port) as socket:
        address = f"http://{as_url_host(settings.host)}:{settings.port}{PATH}"
        print(f"serving {address}", flush=True)
        if chosen_token is None:
            print(f"{TOKEN}={token}", flush=True)
        try:
            server.run(sockets=[socket])
        except (Interrupted, KeyboardInterrupt):
            print("stopped", flush=True)
    return {"address": address}
