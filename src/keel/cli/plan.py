"""Forecast memory and seconds per step of a run of `keel train` on this machine, without loading its weights.

keel times steps of the same run with random models of one layer and of seven layers, and extrapolates to all layers. It
does not count other load on the machine, nor scorers that are not models. If the run does not fit, it tries changes in
turn until it does.

example:
  keel plan run.yaml
  keel plan run.yaml --response-tokens 40 --memory-gb 8
"""

from typing import Any

from keel.cli.settings import read_command
from keel.cli.tables import show
from keel.config import PlanConfig


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns the forecast."""
    command = read_command("plan", PlanConfig, arguments, str(__doc__))
    from keel.training.plan_process import plan_in_subprocess

    found = plan_in_subprocess(command.settings)
    show("memory that stays, MB", found["models"])
    phases = {name: {"peak MB": part["peak_mb"], "seconds": part["seconds"]} for name, part in found["phases"].items()}
    rows = {column: {name: part[column] for name, part in phases.items()} for column in ("peak MB", "seconds")}
    show("a step", rows)
    fits = "fits" if found["fits"] else "does not fit"
    print(
        f"peak {found['peak_mb']:,.0f} MB of {found['available_mb']:,.0f} MB: {fits}; "
        f"{found['step_seconds']:.2f} s a step (± {found['step_seconds_error']:.2f}), "
        f"{found['run_hours']:.2g} hours in all"
    )
    if found["changes"]:
        show("with these changes, one on top of the other", found["changes"])
    return found
