"""Errors that a user can cause or fix. Each has one line: where, what is wrong, and how to fix it."""

from collections.abc import Mapping
from typing import Any


class KeelError(Exception):
    """Base class of expected failures."""

    exit_code = 1
    """exit code of the command line"""
    metrics: Mapping[str, Any] | None = None
    """metrics that --json prints in spite of the error, for example if a finished model fails its gate"""

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        prefix = f"{self.where}: " if self.where else ""
        suffix = f" -> {self.fix}" if self.fix else ""
        return " ".join(f"{prefix}{self.what}{suffix}".split())


class ConfigError(KeelError, ValueError):
    """A setting is missing, unknown or impossible. Nothing was started."""

    exit_code = 2


class DataError(KeelError, ValueError):
    """A data file or a row cannot be used. Nothing was started."""

    exit_code = 2


class Diverged(KeelError, ArithmeticError):
    """Numbers are not finite, or the policy has collapsed. The last healthy checkpoint is kept."""

    exit_code = 3


class Halted(Diverged):
    """The doctor reported a critical finding, and `doctor: stop` is set. A checkpoint is kept."""


class RewardError(KeelError, RuntimeError):
    """A scorer failed, or returned something that is not a score."""

    exit_code = 4


class GateFailed(KeelError, RuntimeError):
    """A model is finished and evaluated, and does not meet its gate."""

    exit_code = 1


class CheckpointError(KeelError, OSError):
    """The run folder cannot be written, or its content cannot be read."""

    exit_code = 5


class ProcessLost(KeelError, RuntimeError):
    """Another process of the run is gone, or does not respond. The last checkpoint is kept."""

    exit_code = 75


class EngineError(KeelError, RuntimeError):
    """The engine that samples for a run has ended, hangs, or returned something that cannot be right."""

    exit_code = 75


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. Its finished steps are saved, and `--resume` continues from there."""

    exit_code = 75
