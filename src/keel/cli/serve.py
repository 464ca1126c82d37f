"""Show all runs under a folder in a live web page: findings, curves, and every logged response.

keel prints a private link, and only reads files. Stop with Ctrl-C.

example:
  keel serve runs
"""

from pathlib import Path
from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.config import ServeConfig
from keel.errors import ConfigError

VERB = Verb("serve", ServeConfig, str(__doc__), positional="folder")


def run(arguments: list[str]) -> dict[str, Any]:
    """Serve the page until a signal comes, and return its address."""
    settings = read_command(VERB, arguments).settings
    if not Path(settings.folder).is_dir():
        problem = "not a folder" if Path(settings.folder).exists() else "no such folder"
        raise ConfigError(problem, where=settings.folder, fix="name the folder that holds your runs")
    from keel.web.dashboard.serve import serve_dashboard

    return {"address": serve_dashboard(settings)}
