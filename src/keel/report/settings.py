"""Settings of a run that differ from the defaults, and how to reproduce the run."""

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
SCORER = ("model", "function", "url", "judge")  # the settings of which a scorer needs one


def non_default_settings(run: Run) -> list[dict[str, Any]]:
    """Return the settings that differ from their default, first those without a default.

    The defaults are those of this version of keel for the run's algorithm. Settings that this version does not have
    are left out.

    Returns:
        [{"name", "value", "default", "needed"}]
    """
    required = _required_settings(run)
    defaults, saved = flat(_default_settings(run, required)), flat(run.settings)
    # The algorithm is passed to get its defaults, but has a default itself.
    without_default = flat(required).keys() - {"algorithm.name"}
    rows = [
        {"name": name, "value": saved[name], "default": default, "needed": name in without_default}
        for name, default in defaults.items()
        if name in saved and name not in NO_MATTER and (name in without_default or saved[name] != default)
    ]
    return sorted(rows, key=lambda row: not row["needed"])


def reproduction(run: Run) -> dict[str, Any]:
    """Return how to reproduce a run.

    Returns:
        {"command", "resume", "config", "inputs", "machine", "surroundings"}. `inputs` holds path -> SHA-256, and
        `machine` describes the machine and the versions; both are empty if the run did not log them. `surroundings`
        holds both in one flat dict. `resume` is None for a run that has finished or is still running.
    """
    folder = RunFolder(run.path)
    origin = _read_origin(folder)
    inputs, machine = (
        {str(k): str(v) for k, v in _as_dict(origin.get(name)).items()} for name in ("inputs", "machine")
    )
    config_file, again = shlex.quote(str(folder.config)), shlex.quote(f"{run.path}-again")
    is_known_stage = run.stage in STAGES
    return {
        "command": f"keel {run.stage} {config_file} --output {again}" if is_known_stage else None,
        "resume": f"keel {run.stage} {config_file} --resume"
        if is_known_stage and run.state.standing in UNFINISHED
        else None,
        "config": read_regular(folder.config).decode(),
        "inputs": inputs,
        "machine": machine,
        "surroundings": {f"machine: {name}": value for name, value in machine.items()}
        | {f"contents of {name}": value[:12] for name, value in inputs.items()},
    }


def _read_origin(folder: RunFolder) -> dict[str, Any]:
    try:
        origin = json.loads(read_regular(folder.began))
    except (OSError, *NO_JSON):
        return {}
    return _as_dict(origin)


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _default_settings(run: Run, required: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a run that sets only the required ones. Empty for a run of an incompatible version."""
    if run.stage not in STAGES:
        return {}
    try:
        return config.parse(STAGES[run.stage], required).model_dump(mode="json")
    except ConfigError:
        return {}


def _required_settings(run: Run) -> dict[str, Any]:
    """Return the settings without a default, the kind of each scorer, and the algorithm, on which defaults depend."""
    required = _fields_without_default(STAGES[run.stage], run.settings) if run.stage in STAGES else {}
    if run.setting("algorithm.name"):
        required["algorithm"] = {"name": run.setting("algorithm.name")}
    if run.setting("rewards"):
        required["rewards"] = [
            {name: scorer[name] for name in SCORER if scorer.get(name)} for scorer in run.setting("rewards")
        ]
    return required


def _fields_without_default(settings: type[BaseModel], saved: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in settings.model_fields.items():
        inner = field.annotation
        if field.is_required() and isinstance(inner, type) and issubclass(inner, BaseModel):
            values[name] = _fields_without_default(inner, saved.get(name) or {})
        elif field.is_required():
            values[name] = saved.get(name)
    return values
