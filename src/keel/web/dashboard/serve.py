"""Serving the dashboard until a signal comes."""

import sys
from contextlib import suppress

from keel.config import ServeConfig
from keel.errors import Interrupted
from keel.server.limits import as_url_host, check_reach, listening, new_token, prompt_server
from keel.web.dashboard.app import dashboard_app
from keel.web.rank.serve import open_link

MAX_CONNECTIONS = 512
TURN = 0.0005  # seconds


def serve_dashboard(settings: ServeConfig) -> str:
    """Print the private link, open it if there is a terminal, and serve. Returns the address.

    Raises ConfigError for an address that cannot be had.
    """
    check_reach(settings.host, settings.public)
    host = as_url_host(next(iter(settings.names), settings.host))
    address = settings.address or f"http://{host}:{settings.port}"
    sys.setswitchinterval(TURN)  # short turns: who reads a small thing does not wait for who reads a large one
    token = new_token()
    server = prompt_server(dashboard_app(settings, token), MAX_CONNECTIONS)
    with listening(settings.host, settings.port) as place:
        link = f"{address}/enter?token={token}"
        print(f"all runs under {settings.folder}: {link}", flush=True)
        if settings.browser:
            open_link(link)
        with suppress(Interrupted, KeyboardInterrupt):
            server.run(sockets=[place])
    return address
