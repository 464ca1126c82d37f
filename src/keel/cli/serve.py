"""Show all runs under a folder in a live web page: findings, curves, and every logged response.

keel prints a private link, and only reads files. Stop with Ctrl-C.

example:
  keel serve runs
"""

from pathlib import Path
from typing import Any

from keel.cli.settings import read_command
from keel.config import ServeConfig
from keel.errors import ConfigError


def run(arguments: list[str]) -> dict[str, Any]:
    """Serves until a signal comes; returns where."""
    settings = read_command("serve", ServeConfig, arguments, str(__doc__), plain="folder").settings
    if not Path(settings.folder).is_dir():
        what = "not a folder" if Path(settings.folder).exists() else "no such folder"
        raise ConfigError(what, where=settings.folder, fix="name the folder that your runs lie in")
    from keel.web.dashboard.serve import serve_dashboard

    return {"address": serve_dashboard(settings)}
