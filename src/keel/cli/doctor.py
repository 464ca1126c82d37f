"""Say whether runs are healthy, or what is wrong, since when, on what evidence, and which change to try.

Reads the run folder only: the run may be going on, be finished, or be dead. What each finding means: docs/diagnosis.md.
A folder that holds runs, such as the stages of one model, stands for all of them, in the order in which they began.

example:
  keel doctor runs/stories-ppo
"""

from pathlib import Path
from typing import Any

from keel.cli.settings import read_command
from keel.config import DoctorConfig


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns each run's diagnosis under "runs"."""
    command = read_command("doctor", DoctorConfig, arguments, str(__doc__), plain="runs")
    from keel.cli.findings import print_diagnosis
    from keel.diagnose.doctor import diagnose
    from keel.diagnose.run import read_run

    paths = [run for path in command.settings.runs for run in stages(path)]
    diagnoses = []
    for path in paths:
        diagnoses.append(diagnose(read_run(path)))
        print_diagnosis(diagnoses[-1])
    return {"runs": [diagnosis.as_json() for diagnosis in diagnoses]}


def stages(path: str) -> list[Path]:
    """The run that lies there, or those below it, the oldest first."""
    from keel.diagnose.run import run_folders

    folder = Path(path)
    found = [] if (folder / "config.yaml").is_file() else list(run_folders(folder))
    return sorted(found, key=lambda run: (run / "config.yaml").stat().st_mtime) or [folder]
