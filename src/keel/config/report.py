"""Settings of `keel report`."""

from keel.config.sections import Runs, Settings


class ReportConfig(Settings):
    """Settings of `keel report`: one page about one run, or comparing several."""

    runs: Runs
    """run folders, or folders that hold runs; the first run is the one that samples and tokens are shown of"""
    output: str | None = None
    """the page to write (default: report.html in the run's folder, of a reward model's run run-report.html; of several
    runs comparison.html in the first folder that is named)"""
    browser: bool = False
    """open it"""
