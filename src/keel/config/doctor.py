"""Settings of `keel doctor`."""

from keel.config.base import Settings
from keel.config.sections import Runs


class DoctorConfig(Settings):
    """Settings of `keel doctor`: diagnose runs."""

    runs: Runs
    """Run folders, or folders that hold runs; a run may be finished, running or dead"""
