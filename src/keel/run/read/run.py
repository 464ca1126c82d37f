"""Read a run from its folder, without torch: settings, metrics by step, and state. The run may be dead."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from keel.errors import CheckpointError, ConfigError
from keel.files import read_regular
from keel.run.folder import RunFolder
from keel.run.lock import is_running, lock_owner
from keel.run.read.settings import check_run_settings, named_sources

INNER_FOLDERS = {"checkpoints", "members", "policy", "critic", "model", "tensorboard", "faults"}
"""Folders inside a run, in which no further runs are searched."""
Series = NDArray[np.float64]
Status = Literal["running", "finished", "stopped", "failed", "died", "unknown"]
STATUSES: tuple[Status, ...] = get_args(Status)
LAST_STEP = 10**12
NO_JSON = (ValueError, KeyError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class State:
    """The state of a run."""

    standing: Status  # died: its process is gone, and there is no ended.json
    what: str = ""  # why it stopped or failed, as the run reported it


@dataclass(frozen=True, eq=False)  # compared by identity: the comparison of two arrays is no single truth value
class Run:
    """A run with S logged steps."""

    path: Path
    settings: Mapping[str, Any]
    steps: NDArray[np.int64]  # [S], ascending
    columns: Mapping[str, Series]  # metric -> [S]; nan where it was not measured or not finite
    state: State

    @classmethod
    def of_lines(cls, path: Path, settings: Mapping[str, Any], lines: list[Mapping[str, Any]], state: State) -> Self:
        """Build a run from the lines of metrics.jsonl."""
        names = dict.fromkeys(name for line in lines for name in line if name != "step")
        steps = np.array([line["step"] for line in lines], dtype=np.int64)
        return cls(path, settings, steps, {name: _series(lines, name) for name in names}, state)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def stage(self) -> str:
        """The command that made the run: train, sft, reward, dpo, or unknown."""
        if "rollout" in self.settings:
            return "train"
        return next((name for name in ("sft", "reward", "dpo") if f"{name}/loss" in self.columns), "unknown")

    @property
    def planned(self) -> int:
        """The setting `steps`; the last logged step for commands without that setting."""
        last = int(self.steps[-1]) if len(self.steps) else 1
        return max(int(self.setting("steps") or last), 1)

    def __getitem__(self, metric: str) -> Series:
        """Return a metric [S]; all nan if the run does not have it."""
        return self.columns.get(metric, np.full(len(self.steps), np.nan))

    def has(self, metric: str) -> bool:
        """Whether a metric was measured at least once."""
        return bool(np.isfinite(self[metric]).any())

    def setting(self, name: str, default: Any = None) -> Any:
        """Return a setting by its dotted name; `default` where it is absent or null."""
        value: Any = self.settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    def until(self, step: int) -> Self:
        """Return the run as it was after this step."""
        count = int(np.searchsorted(self.steps, step, side="right"))
        columns = {name: values[:count] for name, values in self.columns.items()}
        return replace(self, steps=self.steps[:count], columns=columns)

    def held_out_scorers(self) -> list[str]:
        """Return the names of the scorers of weight 0, which are measured and not learned from."""
        return [name for name, weight in self.scorer_weights().items() if weight == 0]

    def scorer_weights(self) -> dict[str, float]:
        """Return name -> weight of each scorer in the settings."""
        sources = named_sources(self.setting("rewards", []))
        return {name: float(source.get("weight", 1.0)) for name, source in sources.items()}

    def reward_models(self) -> dict[str, dict[str, float]]:
        """Return name -> metrics of each reward model that is learned from.

        The metrics are those of figures.json beside its folder; a model without that file is left out.
        """
        models = {}
        for name, source in named_sources(self.setting("rewards", [])).items():
            learned_from = source.get("weight", 1.0) and source.get("model")
            metrics = _read_numbers(Path(source["model"]).parent) if learned_from else {}
            if "accuracy" in metrics and "length_accuracy" in metrics:
                models[name] = metrics
        return models


def read_run(path: str | Path) -> Run:
    """Read a run folder.

    Steps that a resumed run repeated count once, as written last. An incomplete last line is skipped.

    Raises:
        ConfigError: the folder holds no run.
        CheckpointError: it cannot be read, or keel cannot have written its settings.
    """
    folder = RunFolder(path)
    if not folder.path.is_dir():
        exists = folder.path.exists()
        raise ConfigError("not a folder" if exists else "no such folder", str(path), "name a run folder")
    if not folder.config.is_file():
        raise ConfigError("this folder holds no run (no config.yaml)", where=str(path), fix="name a run folder")
    run = Run.of_lines(folder.path, folder.settings(), read_metrics(folder.metrics), read_state(folder))
    check_run_settings(run.settings, run.stage, str(folder.config))
    return run


def run_folders(root: Path) -> Iterator[Path]:
    """Yield the run folders at or below `root`: those with settings, and metrics or checkpoints.

    Links are not followed. Folders that cannot be read are skipped.
    """
    remaining = [root]
    while remaining:
        folder = remaining.pop()
        with suppress(OSError), os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
            is_run = "config.yaml" in names and ("metrics.jsonl" in names or bool(names.get("checkpoints")))
            if is_run:
                yield folder
            skipped = INNER_FOLDERS if is_run else set()
            remaining += [
                folder / name for name, is_dir in names.items() if is_dir and name not in skipped and name[0] != "."
            ]


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """Return the complete lines of metrics.jsonl in order of their steps; [] if there is no file.

    Raises CheckpointError for a line, also an empty one, that holds no metrics.
    """
    try:
        text = read_regular(path).rpartition(b"\n")[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(error.strerror or str(error), where=str(path)) from error
    rows: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(text.split(b"\n") if text else [], start=1):
        try:
            row = json.loads(line)
            rows[read_step(row)] = row
        except NO_JSON as error:
            raise CheckpointError("not a line of a run's metrics", f"{path}:{number}") from error
    return [rows[step] for step in sorted(rows)]


def read_step(row: Any) -> int:
    """Return the step of a line of metrics. Raises one of NO_JSON if it has none."""
    step = row["step"]
    if type(step) is not int or not 0 <= step <= LAST_STEP:
        raise ValueError(f"invalid step: {step!r:.20}")
    return step


def read_state(folder: RunFolder) -> State:
    """Return the state from the file that a run writes at its end, else from its lock and its process."""
    with suppress(OSError, *NO_JSON):
        ended = json.loads(read_regular(folder.ended))
        status: Status = next((name for name in STATUSES if name == ended["standing"]), "unknown")
        return State(status, str(ended["what"]))
    owner, running = lock_owner(folder.path), is_running(folder.path)
    if owner is None or running is None:
        return State("unknown")
    if running:
        return State("running")
    if folder.policy.is_dir() or folder.model.is_dir():  # the result is written last
        return State("finished")
    return State("died", f"process {owner.process} is gone and left no message")


def _series(lines: list[Mapping[str, Any]], name: str) -> Series:
    return np.array([_number(line.get(name)) for line in lines], dtype=np.float64)


def _number(value: Any) -> float:
    """Return a finite number as a float; nan for anything else."""
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else float("nan")


def _read_numbers(folder: Path) -> dict[str, float]:
    """Return the finite numbers of figures.json; {} where it cannot be read."""
    try:
        values = json.loads(read_regular(folder / "figures.json")).items()
    except (OSError, AttributeError, *NO_JSON):
        return {}
    return {name: _number(value) for name, value in values if math.isfinite(_number(value))}
