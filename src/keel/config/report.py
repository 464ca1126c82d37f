"""Settings of `keel report`."""

from keel.config.base import Settings
from keel.config.sections import Runs


class ReportConfig(Settings):
    """Settings of `keel report`: write one page about a run, or a comparison of several."""

    runs: Runs
    """Run folders, or folders that hold runs; samples and tokens are shown of the first run"""
    output: str | None = None
    """HTML file to write (default: report.html in the run folder, run-report.html for a reward model, and
    comparison.html in the first folder for several runs)"""
    browser: bool = False
    """Open the page in a browser"""
