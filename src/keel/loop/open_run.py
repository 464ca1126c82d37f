"""Open the run folder of a training loop."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from keel.config import Settings
from keel.run.folder import RunFolder
from keel.run.origin import check_origin
from keel.world import World, lost_process_reported, raise_together


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

    Raises ConfigError, on every process, for a folder that is in use or holds another run.
    """

    def open_folder() -> RunFolder:
        return RunFolder.open(output, config.model_dump(mode="json"), resume) if world.is_main else RunFolder(output)

    folder: RunFolder = raise_together(world, open_folder)
    try:
        yield folder
    finally:
        folder.close()
