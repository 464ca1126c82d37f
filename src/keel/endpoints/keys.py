"""Keys of servers, which are environment variables."""

import os
import re

from keel.errors import ConfigError


def check_key(name: str) -> None:
    """Raise ConfigError if the environment variable holds a key that no header can hold.

    The errors of HTTP libraries about such a header show the key.
    """
    if not re.fullmatch("([!-~]([ -~]*[!-~])?)?", os.environ.get(name, "")):
        what = "the key has a line break, a space at an end, or a character outside of ASCII"
        raise ConfigError(what, name, "set it to the key alone")
