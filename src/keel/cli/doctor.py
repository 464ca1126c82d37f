"""Diagnose runs: whether they are healthy, or else what is wrong, since when, and which change to try.

keel reads the run folder only: the run may be running, finished or dead. docs/reference/findings.md explains each
finding. A folder that holds runs, such as the stages of one model, means all of them, from oldest to newest. A run
that cannot be read is reported at the end and sets the exit code. Findings leave the exit code at 0; scripts read them
with --json.

example:
  keel doctor runs/stories-ppo
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.cli.settings import read_command
from keel.config import DoctorConfig
from keel.errors import KeelError
from keel.terminal import tell


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns the diagnosis of each run that can be read under "runs".

    Raises the error of one that cannot, once all the others have been looked at.
    """
    command = read_command("doctor", DoctorConfig, arguments, str(__doc__), plain="runs")
    from keel.cli.findings import print_diagnosis
    from keel.diagnosis.doctor import diagnose
    from keel.run.read.run import read_run

    paths = [run for path in command.settings.runs for run in stages(path)]
    diagnoses, errors = [], []
    for path in paths:
        try:
            diagnoses.append(diagnose(read_run(path)))
        except KeelError as error:
            errors.append(error)
        else:
            print_diagnosis(diagnoses[-1])
    metrics = {"runs": [diagnosis.as_json() for diagnosis in diagnoses]}
    if errors:
        raise gravest_error(errors, metrics if diagnoses else None)
    return metrics


def gravest_error(errors: Sequence[KeelError], metrics: Mapping[str, Any] | None) -> KeelError:
    """The gravest of the errors, for `main` to tell, with what --json prints all the same; the others are told."""
    gravest = max(errors, key=lambda error: error.exit_code)
    gravest.metrics = metrics
    for error in errors:
        if error is not gravest:
            tell(f"error: {error}")
    return gravest


def stages(path: str) -> list[Path]:
    """The run that lies there, or those below it, the oldest first."""
    from keel.run.read.run import run_folders

    folder = Path(path)
    found = [] if (folder / "config.yaml").is_file() else list(run_folders(folder))
    return sorted(found, key=lambda run: (run / "config.yaml").stat().st_mtime) or [folder]
