"""Check before a long computation that its result can be written."""

from pathlib import Path

from keel.errors import ConfigError


def require_writable(output: str | Path | None) -> None:
    """Create the folder of an output file, and raise ConfigError if the file could not be written.

    None and "" stand for no file.
    """
    if not output:
        return
    target = Path(output)
    if target.is_dir():
        raise ConfigError("this is a folder", where=str(output), fix="name a file")
    trial = target.with_name(f".{target.name}.tmp")  # `write_atomic` will write this file first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write here: {error.strerror}", str(output), "choose another output") from error
