"""Find out what is wrong with runs, since which step, on what evidence, and which setting to change.

keel reads the run folder only, so the run may be running, finished or dead. docs/reference/findings.md explains each
finding. A folder of several runs, such as the stages of one model, means all of them, oldest first. A run that cannot
be read is reported at the end and sets the exit code. Findings leave the exit code at 0; scripts read them with --json.

example:
  keel doctor runs/stories-ppo
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.config import DoctorConfig
from keel.errors import KeelError
from keel.terminal import print_line

VERB = Verb("doctor", DoctorConfig, str(__doc__), positional="runs")


def run(arguments: list[str]) -> dict[str, Any]:
    """Print the diagnosis of each run, and return them under "runs".

    A run that cannot be read does not stop the others. Its error is raised at the end.
    """
    command = read_command(VERB, arguments)
    from keel.cli.findings import print_diagnosis
    from keel.diagnosis.doctor import diagnose
    from keel.run.read.run import read_run

    folders = [folder for path in command.settings.runs for folder in find_runs(path)]
    diagnoses, errors = [], []
    for folder in folders:
        try:
            diagnoses.append(diagnose(read_run(folder)))
        except KeelError as error:
            errors.append(error)
        else:
            print_diagnosis(diagnoses[-1])
    metrics = {"runs": [diagnosis.as_json() for diagnosis in diagnoses]}
    if errors:
        raise gravest_error(errors, metrics if diagnoses else None)
    return metrics


def gravest_error(errors: Sequence[KeelError], metrics: Mapping[str, Any] | None) -> KeelError:
    """Return the error with the highest exit code, and print the others.

    `metrics` is attached to the error, so that --json still prints the diagnoses of the other runs.
    """
    gravest = max(errors, key=lambda error: error.exit_code)
    gravest.metrics = metrics
    for error in errors:
        if error is not gravest:
            print_line(f"error: {error}")
    return gravest


def find_runs(path: str) -> list[Path]:
    """Return the run folder at `path`, or the run folders below it, oldest first.

    Returns `path` itself if there is no run, so that reading it raises the error that names it.
    """
    from keel.run.read.run import run_folders

    folder = Path(path)
    folders = [] if (folder / "config.yaml").is_file() else list(run_folders(folder))
    return sorted(folders, key=lambda run: (run / "config.yaml").stat().st_mtime) or [folder]
