"""Write an HTML page about a run, or comparing several: verdict, curves, score against KL, samples, settings.

keel reads the run folders only: runs may be running, finished or dead. The page is one file and needs no network. A
folder that holds runs means all of them, as for `keel doctor`.

example:
  keel report runs/stories-ppo
  keel report runs/a runs/b runs/c --output compared.html
"""

import webbrowser
from pathlib import Path
from typing import Any

from keel.cli.doctor import stages
from keel.cli.settings import read_command
from keel.config import ReportConfig
from keel.terminal import literal


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns where the page is, and the doctor's verdict on each run."""
    settings = read_command("report", ReportConfig, arguments, str(__doc__), plain="runs").settings
    from keel.report.run_report import write_report

    paths = [str(run) for path in settings.runs for run in stages(path)]
    target, verdicts = write_report(paths, settings.output, home=settings.runs[0])
    for path, verdict in verdicts.items():
        print(f"{literal(path)}: {verdict}")
    print(f"the report: {literal(str(target))}")
    if settings.browser:
        webbrowser.open(Path(target).resolve().as_uri())
    return {"report": str(target), "verdicts": verdicts}
