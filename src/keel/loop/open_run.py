"""Open the run folder of a training loop."""

import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from keel.config import Settings
from keel.errors import ConfigError
from keel.run.folder import RunFolder
from keel.run.origin import check_origin
from keel.world import World, lost_process_reported, raise_together

SHARED_TRIALS, SHARED_PAUSE = 10, 0.5
"""attempts to see a new file, and seconds between them: a network file system shows it a little later"""


@contextmanager
def open_run(
    output: str,
    config: Settings,
    sources: Iterable[str | tuple[str, str] | None],
    resume: bool,
    world: World,
    code: Iterable[str] = (),
) -> Iterator[RunFolder]:
    """Lock the run folder, and record at the end of the block how the run ended.

    Only the main process locks and writes. The others wait until it has accepted the folder.

    Args:
        sources: files and folders that the run reads, or (name, fingerprint) for data that is not in a file.
        code: files of reward functions, which may change between the start of the run and its continuation.

    Raises ConfigError for a folder that is in use or holds another run, and for sources that have changed.
    """
    with lock_folder(output, config, resume, world) as folder:
        world.from_main(lambda: check_origin(folder, sources, world.size, resume, code))
        with folder.outcome_recorded() if world.is_main else nullcontext(), lost_process_reported():
            yield folder


@contextmanager
def lock_folder(output: str, config: Settings, resume: bool, world: World) -> Iterator[RunFolder]:
    """Lock the run folder inside the block, and save the settings in it. Only the main process does so.

    Raises ConfigError, on every process, for a folder that is in use or holds another run, or that the machines of the
    processes do not share.
    """

    def open_folder() -> RunFolder:
        return RunFolder.open(output, config.model_dump(mode="json"), resume) if world.is_main else RunFolder(output)

    folder: RunFolder = raise_together(world, open_folder)
    try:
        if world.size > 1:
            _require_shared(folder, world)
        yield folder
    finally:
        folder.close()


def _require_shared(folder: RunFolder, world: World) -> None:
    """Compare the lock file that each process sees with that of the main process. Raises ConfigError on all.

    Checkpoints consist of files of all processes, so that a folder on a local disk would fail at the first one.
    """
    expected = world.from_main(folder.read_lock)

    def compare() -> None:
        for _ in range(SHARED_TRIALS):
            if folder.read_lock() == expected:
                return
            time.sleep(SHARED_PAUSE)
        raise ConfigError(
            f"process {world.rank} on {platform.node()} does not see the files of process 0 in this folder",
            str(folder.path),
            "choose an output on a disk that all machines share, under the same path",
        )

    raise_together(world, compare)
