"""A run as its folder tells it: settings, figures by step, and how it stands. Works on a dead run, without torch."""

import json
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

PARTS = {"checkpoints", "members", "policy", "critic", "model", "tensorboard", "faults"}
"""Folders inside a run, which hold no runs of their own to look at."""
Series = NDArray[np.float64]
Standing = Literal["running", "finished", "stopped", "failed", "died", "unknown"]
STANDINGS: tuple[Standing, ...] = get_args(Standing)
LAST_STEP = 10**12
NO_JSON = (ValueError, KeyError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class State:
    """How a run stands."""

    standing: Standing  # died: its process is gone and left no word
    what: str = ""  # why it stopped or failed, as the run reported it


@dataclass(frozen=True)
class Run:
    """What is known of a run of S logged steps."""

    path: Path
    settings: Mapping[str, Any]
    steps: NDArray[np.int64]  # [S], rising
    columns: Mapping[str, Series]  # figure -> [S], nan where it was not measured or not finite
    state: State

    @classmethod
    def of_lines(cls, path: Path, settings: Mapping[str, Any], lines: list[Mapping[str, Any]], state: State) -> Self:
        """From the lines of metrics.jsonl."""
        names = dict.fromkeys(name for line in lines for name in line if name != "step")
        steps = np.array([line["step"] for line in lines], dtype=np.int64)
        return cls(path, settings, steps, {name: _series(lines, name) for name in names}, state)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def stage(self) -> str:
        """train, sft, reward or dpo: which verb made it."""
        if "rollout" in self.settings:
            return "train"
        return next((name for name in ("sft", "reward", "dpo") if f"{name}/loss" in self.columns), "unknown")

    @property
    def planned(self) -> int:
        """Steps that were asked for; of the supervised verbs, those that were made."""
        last = int(self.steps[-1]) if len(self.steps) else 1
        return max(int(self.setting("steps") or last), 1)

    def __getitem__(self, metric: str) -> Series:
        """[S]; all nan for a figure that the run does not have."""
        return self.columns.get(metric, np.full(len(self.steps), np.nan))

    def has(self, metric: str) -> bool:
        """Whether it was measured at least once."""
        return bool(np.isfinite(self[metric]).any())

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its dotted name; `default` where it is absent or null."""
        value: Any = self.settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    def until(self, step: int) -> Self:
        """The run as it was after this step."""
        count = int(np.searchsorted(self.steps, step, side="right"))
        columns = {name: values[:count] for name, values in self.columns.items()}
        return replace(self, steps=self.steps[:count], columns=columns)

    def held_out_scorers(self) -> list[str]:
        """Scorers of weight 0: measured, and not learned from."""
        return [name for name, weight in self.scorer_weights().items() if weight == 0]

    def scorer_weights(self) -> dict[str, float]:
        """Name of each scorer of the settings -> its weight."""
        sources = named_sources(self.setting("rewards", []))
        return {name: float(source.get("weight", 1.0)) for name, source in sources.items()}

    def reward_models(self) -> dict[str, dict[str, float]]:
        """Name of each reward model that is learned from -> the figures of the run that made it, where they are found:
        figures.json beside its folder."""
        found = {}
        for name, source in named_sources(self.setting("rewards", [])).items():
            learned_from = source.get("weight", 1.0) and source.get("model")
            metrics = _metrics(Path(source["model"]).parent) if learned_from else {}
            if "accuracy" in metrics and "length_accuracy" in metrics:
                found[name] = metrics
        return found


def read_run(path: str | Path) -> Run:
    """Raises ConfigError for a folder that holds no run, CheckpointError for one that cannot be read, or whose settings
    keel cannot have written.

    Steps that a run repeated after it was resumed count once, as last written; a last line cut short is passed over.
    """
    folder = RunFolder(path)
    if not folder.path.is_dir():
        is_there = folder.path.exists()
        raise ConfigError("not a folder" if is_there else "no such folder", str(path), "name a run folder")
    if not folder.config.is_file():
        raise ConfigError("this folder holds no run (no config.yaml)", where=str(path), fix="name a run folder")
    run = Run.of_lines(folder.path, folder.settings(), read_metrics(folder.metrics), read_state(folder))
    check_run_settings(run.settings, run.stage, str(folder.config))
    return run


def run_folders(root: Path) -> Iterator[Path]:
    """Folders at or below `root` with settings and figures or checkpoints. Links are not followed, folders that cannot
    be read are passed."""
    left = [root]
    while left:
        folder = left.pop()
        with suppress(OSError), os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
            is_run = "config.yaml" in names and ("metrics.jsonl" in names or bool(names.get("checkpoints")))
            if is_run:
                yield folder
            parts = PARTS if is_run else set()
            left += [folder / name for name, inner in names.items() if inner and name not in parts and name[0] != "."]


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """The whole lines of metrics.jsonl by step. Raises CheckpointError for one that is none, an empty one included."""
    try:
        whole = read_regular(path).rpartition(b"\n")[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(error.strerror or str(error), where=str(path)) from error
    found: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            row = json.loads(line)
            found[read_step(row)] = row
        except NO_JSON as error:
            raise CheckpointError("not a line of a run's metrics", f"{path}:{number}") from error
    return [found[step] for step in sorted(found)]


def read_step(row: Any) -> int:
    """The step of a line of metrics. Raises one of NO_JSON where there is none."""
    step = row["step"]
    if type(step) is not int or not 0 <= step <= LAST_STEP:
        raise ValueError(f"{step!r:.20} is no step")
    return step


def read_state(folder: RunFolder) -> State:
    """From what the run wrote when it ended, or whether its process is there."""
    with suppress(OSError, *NO_JSON):
        said = json.loads(read_regular(folder.ended))
        standing: Standing = next((known for known in STANDINGS if known == said["standing"]), "unknown")
        return State(standing, str(said["what"]))
    owner, running = lock_owner(folder.path), is_running(folder.path)
    if owner is None or running is None:
        return State("unknown")
    if running:
        return State("running")
    if folder.policy.is_dir() or folder.model.is_dir():  # the result, which is written last
        return State("finished")
    return State("died", f"process {owner.process} is gone and left no word")


def _series(lines: list[Mapping[str, Any]], name: str) -> Series:
    return np.array([_number(line.get(name)) for line in lines], dtype=np.float64)


def _number(value: Any) -> float:
    """nan for what is no finite number."""
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else float("nan")


def _metrics(folder: Path) -> dict[str, float]:
    """The finite numbers of figures.json; none where it cannot be read."""
    try:
        found = json.loads(read_regular(folder / "figures.json")).items()
    except (OSError, AttributeError, *NO_JSON):
        return {}
    return {name: _number(value) for name, value in found if _number(value) == _number(value)}
