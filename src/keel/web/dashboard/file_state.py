"""Detection of changed files without reading them."""

from pathlib import Path


def file_signature(path: Path) -> tuple[tuple[int, ...], ...]:
    """Return device, inode, mode, size and modification time of a file and, if it is a link, of the link itself.

    The result is empty if there is no such file.
    """
    try:
        results = [path.stat(), path.lstat()]
    except OSError:
        return ()
    return tuple((each.st_dev, each.st_ino, each.st_mode, each.st_size, each.st_mtime_ns) for each in results)
