"""Open the run folder of a training loop."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from keel.config import Settings
from keel.run.folder import RunFolder
from keel.run.origin import check_origin
from keel.world import World, lost_process_reported


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
    folder = RunFolder(output)
    if world.is_main:
        folder = RunFolder.open(output, config.model_dump(mode="json"), resume)
    try:
        if world.is_main:
            check_origin(folder, sources, world.size, resume, code)
        world.barrier()
        with folder.outcome_recorded() if world.is_main else nullcontext(), lost_process_reported():
            yield folder
    finally:
        folder.close()
