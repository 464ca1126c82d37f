"""Forecast memory and seconds per step of a run of `keel train` on this machine, without loading its weights.

keel times steps of the same run with random models of one layer and of seven layers, and extrapolates to all layers. It
does not count other load on the machine, nor scorers that are not models. If the run does not fit, it tries changes in
turn until it does. With several devices, it forecasts each of them with its share of the batch. Seconds are those of
this machine, without the exchange between devices.

example:
  keel plan run.yaml
  keel plan run.yaml --response-tokens 40 --memory-gb 8
  keel plan run.yaml --devices 8 --memory-gb 80
"""

from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.cli.tables import print_table
from keel.config import PlanConfig

TIME_NOTE = "seconds on this machine, without the exchange between devices; on a CPU, start includes loading"
VERB = Verb("plan", PlanConfig, str(__doc__))


def run(arguments: list[str]) -> dict[str, Any]:
    """Print and return the forecast."""
    command = read_command(VERB, arguments)
    from keel.training.plan_process import plan_in_subprocess

    forecast = plan_in_subprocess(command.settings)
    devices = command.settings.devices
    phases = forecast["phases"].items()
    columns = {
        "peak MB": {name: phase["peak_mb"] for name, phase in phases},
        "seconds": {name: phase["seconds"] for name, phase in phases},
    }
    if devices > 1:
        print_table(f"memory of each of {devices} devices, MB", {name: _memory(phase) for name, phase in phases})
        columns["MB received"] = {name: phase["moved_mb"] for name, phase in phases}
        print_table("one step on each device", columns, TIME_NOTE)
    else:
        print_table("resident memory, MB", forecast["models"])
        print_table("one step", columns)
    verdict = "fits" if forecast["fits"] else "does not fit"
    print(
        f"peak {forecast['peak_mb']:,.0f} MB of {forecast['available_mb']:,.0f} MB: {verdict}; "
        f"{forecast['step_seconds']:.2f} s a step (± {forecast['step_seconds_error']:.2f}), "
        f"{forecast['run_hours']:.2g} hours in all"
    )
    if devices > 1:
        print(
            f"memory of a machine while it loads: {forecast['loading_mb']:,.0f} MB for the process whose turn it is; "
            f"a checkpoint takes {forecast['checkpoint_mb']:,.0f} MB of disk"
        )
    if forecast["changes"]:
        print_table("with these changes, each in addition to those before it", forecast["changes"])
    return forecast


def _memory(phase: dict[str, Any]) -> dict[str, float]:
    """Return the rows of a phase in the table of memory, in MB."""
    rest = {"gathered weights": phase["gathered_mb"], "activations and libraries": phase["rest_mb"]}
    return phase["models"] | rest | {"peak": phase["peak_mb"]}
