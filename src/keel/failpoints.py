"""Named points in the code where a test makes a run fail, to check that it recovers.

    KEEL_FAILPOINT="save.content:2=kill9" keel train run.yaml --resume

The value is NAME[:NTH]=ACTION, or several of these joined by commas. NTH counts visits, and is 1 if left out.
docs/reliability.md lists the names.
"""

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from keel.errors import ConfigError

VARIABLE = "KEEL_FAILPOINT"
NAMES = {
    "start.loaded": "models and data are loaded, nothing is written yet",
    "start.resumed": "a checkpoint has been restored",
    "step.sample": "before the policy samples responses",
    "step.score": "before the scorers are called",
    "step.targets": "before log-probabilities, values and advantages are computed",
    "step.update": "before the first optimizer step",
    "update.loss": "a loss has been computed (nan: it is not finite)",
    "update.gradient": "a gradient has been computed (nan: it is not finite)",
    "update.optimizer": "before an optimizer step changes the weights",
    "step.evaluate": "before the policy is evaluated during the run",
    "step.log": "after the update, before its metrics are written",
    "log.append": "before lines are added to metrics.jsonl or rollouts.jsonl",
    "log.appended": "after these lines are added",
    "save.begin": "before anything of a checkpoint is written",
    "save.content": "after each part of a checkpoint: state, tensors, models",
    "save.manifest": "before the manifest is written",
    "save.visible": "before the checkpoint gets its name",
    "save.old": "before old checkpoints are deleted",
    "save.done": "after old checkpoints are deleted",
    "result.begin": "before the trained model is written",
    "result.visible": "before the trained model gets its name",
    "result.done": "after the trained model has its name",
}
ACTIONS = "kill9, raise:ERRNO (as ENOSPC), sleep:SECONDS or nan"

_visits: Counter[str] = Counter()


def failpoint(name: str) -> bool:
    """Run the actions that KEEL_FAILPOINT requests for this visit, and return whether one of them is `nan`.

    Raises OSError for the action `raise`, ConfigError for a request that cannot be read.
    """
    due = _due(name)
    for action in due:
        os.write(2, f"failpoint {name}: {action}\n".encode())
        kind, _, value = action.partition(":")
        match kind:
            case "kill9":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                code = getattr(errno, value)
                raise OSError(code, os.strerror(code), f"failpoint {name}")
            case "sleep":
                time.sleep(float(value))
    return "nan" in due


def inject_nan(name: str, numbers: Any) -> Any:
    """Run `failpoint`, and return the numbers, replaced by NaN if it returns True."""
    return numbers * float("nan") if failpoint(name) else numbers


def _due(name: str) -> list[str]:
    """Count a visit, and return its actions."""
    requests = os.environ.get(VARIABLE)
    if not requests:
        return []
    _visits[name] += 1
    return [action for point, nth, action in _parse(requests) if (point, nth) == (name, _visits[name])]


def _parse(requests: str) -> Iterator[tuple[str, int, str]]:
    for request in requests.split(","):
        point, _, action = request.strip().partition("=")
        name, _, nth = point.partition(":")
        kind, _, value = action.partition(":")
        is_action = kind in ("kill9", "nan") or (kind == "raise" and hasattr(errno, value)) or _is_sleep(kind, value)
        if name not in NAMES or not (nth or "1").isdigit() or nth == "0" or not is_action:
            raise ConfigError(f"no such failpoint: {request}", VARIABLE, f"write NAME[:NTH]=ACTION with {ACTIONS}")
        yield name, int(nth or 1), action


def _is_sleep(kind: str, value: str) -> bool:
    return kind == "sleep" and value.replace(".", "", 1).isdigit()
