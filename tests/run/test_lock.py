"""Who writes in a run folder, and whether it still does."""

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from keel.errors import ConfigError
from keel.run import lock
from keel.run.folder import RunFolder
from keel.run.lock import LOCK, Owner, boot_id, is_running, lock_owner, take_lock
from keel.run.read.run import read_state

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks")


def test_the_lock_says_who_has_it_and_where(tmp_path: Path) -> None:
    handle = take_lock(tmp_path)
    assert lock_owner(tmp_path) == Owner(os.getpid(), platform.node(), boot_id())
    assert is_running(tmp_path) is True
    assert read_state(RunFolder(tmp_path)).standing == "running"
    with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} since [\d: -]+ on {platform.node()} ->"):
        take_lock(tmp_path)
    os.close(handle)
    assert is_running(tmp_path) is False


def test_a_reader_does_not_keep_a_trainer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.close(take_lock(tmp_path))
    reader = os.open(tmp_path / LOCK, os.O_RDONLY)
    assert lock._lock(reader, exclusive=False)
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.close(reader))  # it has seen enough
    os.close(take_lock(tmp_path))


def test_another_process_with_the_same_number_is_not_the_run(tmp_path: Path) -> None:
    """This process lives, has the number that the lock names, and writes nothing there."""
    os.close(take_lock(tmp_path))
    assert is_running(tmp_path) is False
    assert read_state(RunFolder(tmp_path)).standing == "died"


@pytest.mark.parametrize(
    ("host", "boot", "running"),
    [
        ("here", "now", False),
        ("here", "before", False),  # the system was started again
        ("a container here", "now", False),
        ("elsewhere", "theirs", None),  # whose lock may not be seen
        ("elsewhere", "", None),
        ("here", "", False),
    ],
)
def test_a_free_lock_of_this_machine_or_another(host: str, boot: str, running: bool | None, tmp_path: Path) -> None:
    names = {"here": platform.node(), "now": boot_id()}
    written = (
        f"process {os.getpid()} since 2026-01-01 00:00:00 on {names.get(host, host)}\nboot {names.get(boot, boot)}\n"
    )
    (tmp_path / LOCK).write_text(written)
    assert is_running(tmp_path) is running
    standing = read_state(RunFolder(tmp_path)).standing
    assert standing == ("unknown" if running is None else "died")


def test_a_lock_that_is_held_is_a_run_wherever_it_is(tmp_path: Path) -> None:
    handle = take_lock(tmp_path)
    (tmp_path / LOCK).write_text("process 1 since 2026-01-01 00:00:00 on elsewhere\nboot theirs\n")
    assert is_running(tmp_path) is True
    os.close(handle)


def test_a_lock_of_an_older_keel_has_a_number_alone(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for process, running in ((os.getpid(), True), (int(gone.stdout), False)):
        (tmp_path / LOCK).write_text(f"process {process} since 2026-01-01 00:00:00")
        assert is_running(tmp_path) is running


@pytest.mark.parametrize("kind", ["nothing", "fifo", "socket", "folder", "empty", "words"])
def test_what_is_no_lock_says_nothing_and_keeps_nobody_waiting(kind: str, tmp_path: Path) -> None:
    path = tmp_path / LOCK
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as made:
            patch.chdir(tmp_path)  # a short name
            made.bind(LOCK)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.write_text({"empty": "", "words": "process -7 since never"}[kind])
    assert lock_owner(tmp_path) is None
    assert is_running(tmp_path) is None
