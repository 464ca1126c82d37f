"""The server of the dashboard, which runs until a signal arrives."""

import sys
from contextlib import suppress

from keel.config import ServeConfig
from keel.errors import Interrupted
from keel.server.limits import as_url_host, check_reach, listening, new_token, prompt_server
from keel.web.dashboard.app import dashboard_app
from keel.web.rank.serve import open_link

MAX_CONNECTIONS = 512
SWITCH_INTERVAL = 0.0005  # seconds


def serve_dashboard(settings: ServeConfig) -> str:
    """Print the private link, open it if the output is a terminal, and serve until a signal arrives.

    Returns:
        The address without the token.

    Raises:
        ConfigError: The address cannot be used.
    """
    check_reach(settings.host, settings.public)
    host = as_url_host(next(iter(settings.names), settings.host))
    address = settings.address or f"http://{host}:{settings.port}"
    # Threads take shorter turns, so that a small request does not wait for a large one.
    sys.setswitchinterval(SWITCH_INTERVAL)
    token = new_token()
    server = prompt_server(dashboard_app(settings, token), MAX_CONNECTIONS)
    with listening(settings.host, settings.port) as listener:
        link = f"{address}/enter?token={token}"
        print(f"all runs under {settings.folder}: {link}", flush=True)
        if settings.browser:
            open_link(link)
        with suppress(Interrupted, KeyboardInterrupt):
            server.run(sockets=[listener])
    return address
