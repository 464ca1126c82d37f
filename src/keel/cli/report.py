"""Write an HTML page about one run, or comparing several: verdict, curves, score against KL, samples, settings.

keel reads the run folders only, so runs may be running, finished or dead. The page is one file and needs no network. A
folder of several runs means all of them, as for `keel doctor`.

example:
  keel report runs/stories-ppo
  keel report runs/a runs/b runs/c --output compared.html
"""

import webbrowser
from pathlib import Path
from typing import Any

from keel.cli.doctor import find_runs
from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.config import ReportConfig
from keel.terminal import literal

VERB = Verb("report", ReportConfig, str(__doc__), positional="runs")


def run(arguments: list[str]) -> dict[str, Any]:
    """Write the page, and return its path and the doctor's verdict on each run."""
    settings = read_command(VERB, arguments).settings
    from keel.report.run_report import write_report

    folders = [str(folder) for path in settings.runs for folder in find_runs(path)]
    target, verdicts = write_report(folders, settings.output, home=settings.runs[0])
    for path, verdict in verdicts.items():
        print(f"{literal(path)}: {verdict}")
    print(f"report: {literal(str(target))}")
    if settings.browser:
        webbrowser.open(Path(target).resolve().as_uri())
    return {"report": str(target), "verdicts": verdicts}
