"""Settings of `keel doctor`."""

from keel.config.sections import Runs, Settings


class DoctorConfig(Settings):
    """Settings of `keel doctor`: say whether runs are healthy, or what is wrong and what to change."""

    runs: Runs
    """run folders, finished, running or dead"""
