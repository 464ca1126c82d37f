"""Named places where a run can be made to fail, so that what it promises after a failure can be tried.

    KEEL_FAILPOINT="save.content:2=kill9" keel train run.yaml --resume

NAME[:NTH]=ACTION, several joined by commas; NTH counts the visits (1 if left out). docs/reliability.md lists them.
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
    "start.loaded": "models and data are in memory, nothing is written yet",
    "start.resumed": "a checkpoint has been put back",
    "step.sample": "before the policy answers",
    "step.score": "before the scorers are asked",
    "step.targets": "before log-probs, values and advantages are computed",
    "step.update": "before the first optimizer step",
    "update.loss": "a loss has been computed (nan: it is not finite)",
    "update.gradient": "a gradient has been computed (nan: it is not finite)",
    "update.optimizer": "before an optimizer step moves the weights",
    "step.evaluate": "before the policy is evaluated during the run",
    "step.log": "after the update, before its figures are written",
    "log.append": "before lines are added to metrics.jsonl or rollouts.jsonl",
    "log.appended": "after that",
    "save.begin": "before anything of a checkpoint is written",
    "save.content": "after each part of a checkpoint: state, tensors, models",
    "save.manifest": "before the manifest is written",
    "save.visible": "before the checkpoint gets its name",
    "save.old": "after that, before old checkpoints are deleted",
    "save.done": "after that",
    "result.begin": "before the trained model is written",
    "result.visible": "before the trained model gets its name",
    "result.done": "after that",
}
ACTIONS = "kill9, raise:ERRNO (as ENOSPC), sleep:SECONDS or nan"

_visits: Counter[str] = Counter()


def failpoint(name: str) -> bool:
    """Do here what KEEL_FAILPOINT asks for, if it does; whether that is nan. Raises OSError, or ConfigError for a
    request that cannot be read."""
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


def poison(name: str, numbers: Any) -> Any:
    """The same, and the numbers, which are NaN where that is asked for."""
    return numbers * float("nan") if failpoint(name) else numbers


def _due(name: str) -> list[str]:
    """What to do on this visit."""
    requests = os.environ.get(VARIABLE)
    if not requests:
        return []
    _visits[name] += 1
    return [action for wanted, nth, action in _parsed(requests) if (wanted, nth) == (name, _visits[name])]


def _parsed(requests: str) -> Iterator[tuple[str, int, str]]:
    for request in requests.split(","):
        place, _, action = request.strip().partition("=")
        name, _, nth = place.partition(":")
        kind, _, value = action.partition(":")
        fits = kind in ("kill9", "nan") or (kind == "raise" and hasattr(errno, value)) or _is_time(kind, value)
        if name not in NAMES or not (nth or "1").isdigit() or nth == "0" or not fits:
            raise ConfigError(f"no such failpoint: {request}", VARIABLE, f"NAME[:NTH]=ACTION, ACTION {ACTIONS}")
        yield name, int(nth or 1), action


def _is_time(kind: str, value: str) -> bool:
    return kind == "sleep" and value.replace(".", "", 1).isdigit()
