"""Forecast a run in a separate process, so that nothing else is in the memory that it measures.

This module does not import torch: loading it in both processes would take a third of the time of a forecast.
"""

import json
import subprocess
import sys
from typing import Any

from keel.config import PlanConfig
from keel.errors import ConfigError


def plan_in_subprocess(config: PlanConfig) -> dict[str, Any]:
    """Run `keel.training.plan.plan` in a subprocess and return its result. Its errors are raised as ConfigError."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", "keel.training.plan"]
    done = subprocess.run(command, input=config.model_dump_json(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the probe failed: {' '.join(done.stderr.split())[-500:]}")
    result = json.loads(done.stdout)
    if "error" in result:
        raise ConfigError(**result["error"])
    forecast: dict[str, Any] = result["forecast"]
    return forecast
