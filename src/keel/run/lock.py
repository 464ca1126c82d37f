"""The lock of a run folder: one trainer at a time writes there, and whoever looks on can tell whether it does."""

import os
import platform
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from keel.errors import ConfigError
from keel.files import open_regular

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"
TRIALS, PAUSE = 10, 0.02  # a reader holds a shared lock for a moment, so a trainer asks more than once
WRITTEN = re.compile(r"process (\d{1,10}) since ([\d: -]+)(?: on (.*)\nboot (.*))?\n?")


@dataclass(frozen=True)
class Owner:
    """Whose run it is or was."""

    process: int
    host: str  # "" as an older keel wrote it
    boot: str  # of which start of the system the process is; "" where it does not tell


def take_lock(folder: Path) -> int:
    """The open file that holds the lock; it dies with the process, so a killed run leaves none behind.

    Raises ConfigError when another trainer has it, OSError when the folder cannot be written.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not any(_lock(handle, exclusive=True) for _ in range(TRIALS)):
            owner = os.read(handle, 1000).decode(errors="replace").partition("\n")[0]
            raise ConfigError(f"in use by {owner}", str(folder), "wait for it, or choose another output")
        os.ftruncate(handle, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"process {os.getpid()} since {since} on {platform.node()}\nboot {boot_id()}\n".encode())
    except BaseException:
        os.close(handle)
        raise
    return handle


def lock_owner(folder: Path) -> Owner | None:
    """The trainer that wrote there last; None where the lock file is missing or says nothing."""
    try:
        with open_regular(folder / LOCK) as file:
            found = WRITTEN.fullmatch(file.read(1000).decode(errors="replace"))
    except OSError:
        return None
    if found is None or not 0 < int(found[1]) < 2**31:
        return None
    return Owner(int(found[1]), found[3] or "", found[4] or "")


def is_running(folder: Path) -> bool | None:
    """Whether a trainer writes in this run folder now; None where that cannot be known.

    The lock is asked, not the number of a process, which another one may have by now. A free lock says nothing of a
    process on another machine, whose locks may not be seen here.
    """
    owner = lock_owner(folder)
    if owner is None or sys.platform == "win32":
        return None
    with suppress(OSError), open_regular(folder / LOCK) as file:  # a file system may have no locks
        if not _lock(file.fileno(), exclusive=False):
            return True
        if not owner.host:
            return _is_alive(owner.process)
        is_here = owner.host == platform.node() or owner.boot == boot_id() != ""
        return False if is_here else None
    return None


def _lock(handle: int, exclusive: bool) -> bool:
    """Whether the lock could be taken; it is held until the file is closed. Raises OSError where there are no locks."""
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            if exclusive:
                time.sleep(PAUSE)
            return False
    return True


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


@cache
def boot_id() -> str:
    """Of the system since it was switched on; "" where it does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
