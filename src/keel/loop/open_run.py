"""Open the run folder of a training loop."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from keel.config import Settings
from keel.run.folder import RunFolder
from keel.run.origin import check_origin
from keel.world import World


@contextmanager
def open_run(
    output: str,
    config: Settings,
    sources: Iterable[str | tuple[str, str] | None],
    resume: bool,
    world: World,
    code: Iterable[str] = (),
) -> Iterator[RunFolder]:
    """Lock the run folder, and record in it how the run ends.

    The main process alone locks and writes; the others read in the folder once it has been accepted.

    Args:
        sources: files and folders that the run reads, or (name, fingerprint) of what no file holds.
        code: files of reward functions, which may change between the run and its continuation.

    Raises ConfigError for a folder that is in use, holds another run, or whose run read other sources.
    """
    folder = RunFolder(output)
    if world.is_main:
        folder = RunFolder.open(output, config.model_dump(mode="json"), resume)
    try:
        if world.is_main:
            check_origin(folder, sources, world.size, resume, code)
        world.barrier()
        with folder.outcome_recorded() if world.is_main else nullcontext():
            yield folder
    finally:
        folder.close()
