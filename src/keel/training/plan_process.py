"""The forecast of a run, made in a process that does nothing else: what it has in its memory is the run's.

Nothing here imports torch: to load it in two processes would be a third of the time that a forecast takes.
"""

import json
import subprocess
import sys
from typing import Any

from keel.config import PlanConfig
from keel.errors import ConfigError


def plan_in_subprocess(config: PlanConfig) -> dict[str, Any]:
    """Return `keel.training.plan.plan` of these settings. Raises what it raised, as a ConfigError."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", "keel.training.plan"]
    done = subprocess.run(command, input=config.model_dump_json(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the probe failed: {' '.join(done.stderr.split())[-500:]}")
    found = json.loads(done.stdout)
    if "error" in found:
        raise ConfigError(**found["error"])
    forecast: dict[str, Any] = found["forecast"]
    return forecast
