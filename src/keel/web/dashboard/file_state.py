"""What tells, without a look inside, that a file is as it was when it was read."""

from pathlib import Path


def appearance(path: Path) -> tuple[tuple[int, ...], ...]:
    """Of what the name leads to and, of a link, of the link itself; empty where there is nothing."""
    try:
        seen = [path.stat(), path.lstat()]
    except OSError:
        return ()
    return tuple((each.st_dev, each.st_ino, each.st_mode, each.st_size, each.st_mtime_ns) for each in seen)
