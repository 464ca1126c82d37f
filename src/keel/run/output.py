"""Whether a result can be written where it is wanted: asked before the work, not after it."""

from pathlib import Path

from keel.errors import ConfigError


def require_writable(output: str | Path | None) -> None:
    """Makes the folder of the file that a verb will write. Raises ConfigError where the file could not be written.

    None and "" ask for no file.
    """
    if not output:
        return
    target = Path(output)
    if target.is_dir():
        raise ConfigError("this is a folder", where=str(output), fix="name a file")
    trial = target.with_name(f".{target.name}.tmp")  # what `write_atomic` will write first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write here: {error.strerror}", str(output), "choose another output") from error
