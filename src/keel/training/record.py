"""The logs of a training run: metrics (docs/metrics.md), sampled responses, progress display and doctor."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from keel.config import TrainConfig
from keel.diagnosis.findings import Finding
from keel.progress import ProgressDisplay
from keel.run.folder import RunFolder
from keel.run.metrics_log import MetricSink, open_sinks, truncate_after
from keel.run.rollout_log import RolloutLog
from keel.training.watch import Watch
from keel.world import World


@dataclass(frozen=True)
class Records:
    """The open logs of a run. They are empty on every process but the main one."""

    sinks: Sequence[MetricSink] = ()
    responses: RolloutLog | None = None
    display: ProgressDisplay | None = None
    watch: Watch | None = None

    def log(self, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> Finding | None:
        """Log a step. Return the critical finding that stops the run, if there is one.

        Raises CheckpointError when a log cannot be written.
        """
        for sink in self.sinks:
            sink.log(step, metrics)
        if self.responses is not None:
            self.responses.log(step, rows)
        if self.display is not None:
            self.display.show(step, headline(metrics))
        return None if self.watch is None else self.watch.look(step, metrics)


@contextmanager
def open_records(folder: RunFolder, config: TrainConfig, done: int, world: World) -> Iterator[Records]:
    """Open the logs and the progress display. Drop the log lines of steps after the first `done` ones."""
    if not world.is_main:
        yield Records()
        return
    truncate_after(folder.rollouts, done, first=1 if config.log.rollouts_per_step else None)
    with (
        open_sinks(folder, config.log.trackers, done, first=1) as sinks,
        ProgressDisplay("train", config.steps, done) as display,
    ):
        yield Records(sinks, RolloutLog(folder.rollouts), display, Watch.start(folder, config))


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Select the metrics of the progress display, under short names."""
    names = {
        "objective/scores": "score",
        "objective/kl": "kl",
        "response/length": "length",
        "critic/explained_variance": "explained",
        "perf/tokens_per_second": "tok/s",
    }
    return {short: metrics[name] for name, short in names.items() if name in metrics}
