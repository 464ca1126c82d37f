"""What a run was told, beside what it would have been without being told."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from keel import config
from keel.errors import ConfigError
from keel.files import read_regular
from keel.run.folder import RunFolder
from keel.run.read.compare import NO_MATTER, flat
from keel.run.read.run import NO_JSON, Run
from keel.run.read.settings import STAGES

UNFINISHED = ("stopped", "died", "failed")
SCORER = ("model", "function", "url")


def non_default_settings(run: Run) -> list[dict[str, Any]]:
    """[{"name", "value", "default", "needed"}] for each setting that is not at its default; first those without one.

    The defaults are those of this version of keel for the run's algorithm; a setting that it no longer has is left out.
    """
    needed = _needed(run)
    defaults, saved = flat(_untold(run, needed)), flat(run.settings)
    must = flat(needed).keys() - {"algorithm.name"}
    rows = [
        {"name": name, "value": saved[name], "default": default, "needed": name in must}
        for name, default in defaults.items()
        if name in saved and name not in NO_MATTER and (name in must or saved[name] != default)
    ]
    return sorted(rows, key=lambda row: not row["needed"])


def reproduction(run: Run) -> dict[str, Any]:
    """{"command", "resume", "config", "inputs", "machine", "surroundings"}: how to make the run again.

    `inputs` are {path: SHA-256} and `machine` what it ran on, both empty for a run that did not write them down;
    `surroundings` is both of them flat. `resume` is None for a run that has ended or is still running.
    """
    folder = RunFolder(run.path)
    began = _began(folder)
    inputs, machine = ({str(k): str(v) for k, v in _mapping(began.get(name)).items()} for name in ("inputs", "machine"))
    config_file, again = shlex.quote(str(folder.config)), shlex.quote(f"{run.path}-again")
    known = run.stage in STAGES
    return {
        "command": f"keel {run.stage} {config_file} --output {again}" if known else None,
        "resume": f"keel {run.stage} {config_file} --resume" if known and run.state.standing in UNFINISHED else None,
        "config": read_regular(folder.config).decode(),
        "inputs": inputs,
        "machine": machine,
        "surroundings": {f"machine: {name}": value for name, value in machine.items()}
        | {f"contents of {name}": value[:12] for name, value in inputs.items()},
    }


def _began(folder: RunFolder) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(folder.began))
    except (OSError, *NO_JSON):
        return {}
    return _mapping(found)


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _untold(run: Run, needed: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, where nothing is told but what must be; nothing for a run of another version."""
    if run.stage not in STAGES:
        return {}
    try:
        return config.parse(STAGES[run.stage], needed).model_dump(mode="json")
    except ConfigError:
        return {}


def _needed(run: Run) -> dict[str, Any]:
    """What has no default, what a scorer is, and the algorithm, on which defaults depend."""
    found = _required(STAGES[run.stage], run.settings) if run.stage in STAGES else {}
    if run.setting("algorithm.name"):
        found["algorithm"] = {"name": run.setting("algorithm.name")}
    if run.setting("rewards"):
        found["rewards"] = [{name: part[name] for name in SCORER if part.get(name)} for part in run.setting("rewards")]
    return found


def _required(settings: type[BaseModel], saved: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in settings.model_fields.items():
        inner = field.annotation
        if field.is_required() and isinstance(inner, type) and issubclass(inner, BaseModel):
            found[name] = _required(inner, saved.get(name) or {})
        elif field.is_required():
            found[name] = saved.get(name)
    return found
