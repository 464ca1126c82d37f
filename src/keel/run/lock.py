"""The lock of a run folder: one trainer at a time writes to it, and readers can tell whether one is running."""

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
TRIALS, PAUSE = 10, 0.02  # attempts and seconds between them: a reader may hold a shared lock for a moment
WRITTEN = re.compile(r"process (\d{1,10}) since ([\d: -]+)(?: on (.*)\nboot (.*))?\n?")


@dataclass(frozen=True)
class Owner:
    """The process that wrote to the run folder last."""

    process: int
    host: str  # "" in files of an older keel
    boot: str  # `boot_id` of the process


def take_lock(folder: Path) -> int:
    """Lock the folder. Return the file descriptor that holds the lock until it is closed.

    The system also releases the lock when the process ends, so a killed run leaves no lock behind. Raises ConfigError
    when another trainer has the lock, OSError when the folder cannot be written.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not any(_lock(handle, exclusive=True) for _ in range(TRIALS)):
            owner = os.read(handle, 1000).decode(errors="replace").partition("\n")[0]
            raise ConfigError(f"in use by {owner}", str(folder), "wait for it to end, or choose another output")
        os.ftruncate(handle, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"process {os.getpid()} since {since} on {platform.node()}\nboot {boot_id()}\n".encode())
        os.fsync(handle)  # processes on other machines read it, and a network file system may send it late
    except BaseException:
        os.close(handle)
        raise
    return handle


def read_lock(folder: Path) -> str | None:
    """Return the text of the lock file, which names the trainer that wrote to the folder last. None without one."""
    try:
        with open_regular(folder / LOCK) as file:
            return file.read(1000).decode(errors="replace")
    except OSError:
        return None


def lock_owner(folder: Path) -> Owner | None:
    """Read which trainer wrote to the folder last. None where the lock file is missing or unreadable."""
    match = WRITTEN.fullmatch(read_lock(folder) or "")
    if match is None or not 0 < int(match[1]) < 2**31:
        return None
    return Owner(int(match[1]), match[3] or "", match[4] or "")


def is_running(folder: Path) -> bool | None:
    """Return whether a trainer is writing to this run folder; None where that is unknown.

    The lock decides, not the process number, which the system may have given to another process. A free lock proves
    nothing about a process on another machine, whose locks may be invisible here.
    """
    owner = lock_owner(folder)
    if owner is None or sys.platform == "win32":
        return None
    with suppress(OSError), open_regular(folder / LOCK) as file:  # some file systems have no locks
        if not _lock(file.fileno(), exclusive=False):
            return True
        if not owner.host:
            return _is_alive(owner.process)
        is_here = owner.host == platform.node() or owner.boot == boot_id() != ""
        return False if is_here else None
    return None


def _lock(handle: int, exclusive: bool) -> bool:
    """Try to take the lock, which is held until the file is closed. Raises OSError on a file system without locks."""
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
    except OSError:  # the process exists but belongs to another user
        return True
    return True


@cache
def boot_id() -> str:
    """Return the id of the current boot of the system; "" where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
