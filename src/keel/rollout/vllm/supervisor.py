"""Run a server as a child, and end all its processes when the trainer is gone, however it ended.

    PYTHON -I supervisor.py FOLDER ARGUMENTS...

The interpreter of the engine runs this file, so it imports nothing but the standard library. Standard input is a pipe
whose other end the trainer holds. The operating system closes it when the trainer dies.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
"""time that the server has to end by itself"""
TRACKER = b"resource_tracker"
"""Python's process that deletes shared memory whose owners are gone; it ends by itself when they are"""
TRACKER_SECONDS = 2.0


def supervise(folder: str, arguments: list[str]) -> int:
    """Run this interpreter with the arguments until it ends or the trainer is gone. Return its exit code."""
    parent = os.getppid()
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *received: stop.append(received[0]))
    # A session of its own makes the server the leader of a process group, which its workers join.
    command = [sys.executable, *arguments]
    server = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, start_new_session=True)
    code: int | None = None
    is_alone = False
    while not (stop or is_alone) and code is None:
        is_alone = has_lost_trainer(parent)
        code = server.poll()
    end_group(server)
    if is_alone:  # nobody else would delete the weights
        shutil.rmtree(folder, ignore_errors=True)
    return code or 0


def has_lost_trainer(parent: int) -> bool:
    """Wait for a moment. Return whether the other end of standard input is closed, or the parent has changed."""
    readable, _, _ = select.select([0], [], [], POLL_SECONDS)
    return bool(readable and not os.read(0, 1)) or os.getppid() != parent


def end_group(server: "subprocess.Popen[bytes]") -> None:
    """End the server and its workers: first by SIGTERM, then by SIGKILL, also if the server itself is gone."""
    deadline = time.monotonic() + GRACE_SECONDS
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGTERM)
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 4)
    for number in group_members(server.pid):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(number, signal.SIGKILL)
    deadline = time.monotonic() + TRACKER_SECONDS
    while group_members(server.pid, True) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 4)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def group_members(group: int, with_trackers: bool = False) -> list[int]:
    """Return the processes of a group (Linux), without those that clean up after the others."""
    members = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:  # noqa: PTH112, PTH208
        if name.isdecimal() and (with_trackers or TRACKER not in _read(f"/proc/{name}/cmdline")):
            state = _read(f"/proc/{name}/stat").rpartition(b")")[2].split()  # state, parent, group, ...
            if len(state) > 2 and int(state[2]) == group and state[0] != b"Z":
                members.append(int(name))
    return members


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:  # the process is gone, or that of another user
        return b""


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1], sys.argv[2:]))
