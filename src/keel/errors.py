"""What can go wrong for a user: each error says what, where, and what to do, in one line."""

from collections.abc import Mapping
from typing import Any


class KeelError(Exception):
    """An expected failure. `exit_code` is what the command line returns."""

    exit_code = 1
    metrics: Mapping[str, Any] | None = None  # what --json prints all the same, where a finished job is judged

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        cure = f" -> {self.fix}" if self.fix else ""
        return " ".join(f"{place}{self.what}{cure}".split())


class ConfigError(KeelError, ValueError):
    """A setting is missing, unknown or impossible; nothing was started."""

    exit_code = 2


class DataError(KeelError, ValueError):
    """A data file or row cannot be used; nothing was started."""

    exit_code = 2


class Diverged(KeelError, ArithmeticError):
    """Numbers left the finite range; the last good checkpoint is kept."""

    exit_code = 3


class Halted(Diverged):
    """The doctor found something critical, and was told to stop the run for it; a checkpoint is kept."""


class RewardError(KeelError, RuntimeError):
    """A scorer failed or answered with something that is no score."""

    exit_code = 4


class GateFailed(KeelError, RuntimeError):
    """A model is finished and judged, and does not reach what its gate asks for."""

    exit_code = 1


class CheckpointError(KeelError, OSError):
    """The run folder cannot be written, or what lies there cannot be read back."""

    exit_code = 5


class ProcessLost(KeelError, RuntimeError):
    """Another process of the run is gone, or does not answer; the last checkpoint is kept."""

    exit_code = 75


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end. Its finished steps are saved, and `--resume` continues from there."""

    exit_code = 75
