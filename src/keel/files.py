"""Open regular files only, in places where others can put files: a FIFO blocks, and a device may never end."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises OSError, also for a FIFO, a device or a socket.
    """
    # O_NONBLOCK: opening a FIFO would otherwise block until another process opens it for writing.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: str | Path) -> bytes:
    """Return the content of a regular file. Raises OSError, or MemoryError if it exceeds half of the memory."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > machine_memory() / 2:
            raise MemoryError(str(path))
        return file.read()


def machine_memory() -> float:
    """Return the bytes of memory that this process may use: those of the machine, or the limit of its cgroup."""
    limits = [float("inf")]
    if hasattr(os, "sysconf"):
        limits.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    with suppress(OSError, ValueError):
        limits.append(
            float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        )  # without a limit it holds `max`
    return min(limits)
