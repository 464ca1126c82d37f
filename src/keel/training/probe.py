"""Some steps of a run, taken to measure what they cost.

The process should do nothing else: its memory is taken to be theirs.
"""

import ctypes
import gc
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from keel.config import TrainConfig, parse
from keel.core.kl import RESOLUTION
from keel.data.batches import TrainingBatch, select_rows
from keel.learn.update import Updater
from keel.models.shallow import shallow_models
from keel.training.self_check import self_check
from keel.training.setup import TrainingSetup, build_training_setup
from keel.training.state import RunState
from keel.training.trainer import PolicyTrainer
from keel.world import World, seconds_of_work

START = "start"  # loading and self-check
STEPS = 3, 5  # at least, and at most; the first is slower than those that follow
ENOUGH = 3.0  # seconds of work after which the fewest steps have to do
INTERVAL = 0.002  # seconds between two looks at the memory


@dataclass(frozen=True)
class Cost:
    """Peak bytes and seconds of the start and of each phase of a step, and how far the seconds may be off."""

    peaks: dict[str, float]
    seconds: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        return max(self.peaks.values())

    @property
    def step_seconds(self) -> float:
        return sum(seconds for phase, seconds in self.seconds.items() if phase != START)

    @property
    def step_error(self) -> float:
        return sum(seconds for phase, seconds in self.errors.items() if phase != START)


def return_memory() -> None:
    """Give the system back what the last probe used, so that the peak of the next one does not include it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)


def probe(
    values: Mapping[str, Any], depths: Mapping[str, int], small: bool = False, response_tokens: int | None = None
) -> Cost:
    """Build the run, check it as every run is checked, and take a few steps.

    Args:
        values: the run's settings.
        depths: number of layers of each model, by folder or hub id.
        small: whether the updater counts the policy of full depth as small.
        response_tokens: mean length of a response.
    """
    config = parse(TrainConfig, {**values, "steps": max(int(values["steps"]), STEPS[1])})  # a run may be shorter
    scorers = [] if config.rewards else [_no_opinion]
    state = Watched(step=0, kl_coef=config.algorithm.kl_coef)
    with shallow_models(depths), state.timed(START):
        parts = build_training_setup(config, scorers, None, World.single())
        updater = OneMinibatch.like(parts.updater, small)
        parts = replace(parts, end_ids=_ends(parts, response_tokens), updater=updater)
        state.trust_sampler = self_check(parts)["check/logprob_gap"] <= RESOLUTION
    trainer = PolicyTrainer(parts)
    trainer.state = state
    began, steps = _work(), list[dict[str, float]]()
    while len(steps) < STEPS[0] or (len(steps) < STEPS[1] and _since(began) < ENOUGH):
        trainer.update_weights(trainer.compute_targets(trainer.score(trainer.sample())))
        steps.append({**state.seconds, "update": state.seconds["update"] * num_minibatches(config)})
    warm = {phase: [each[phase] for each in steps[1:]] for phase in state.seconds}
    warm[START] = [state.seconds[START]]
    fastest = {phase: min(each) for phase, each in warm.items()}  # what disturbs a step makes it longer
    return Cost(state.peaks, fastest, {phase: statistics.median(warm[phase]) - fastest[phase] for phase in warm})


def num_minibatches(config: TrainConfig) -> int:
    """Number of minibatches in a batch."""
    return max(1, config.rollout.batch_size // (config.algorithm.minibatch_size or config.rollout.batch_size))


@dataclass(frozen=True)
class OneMinibatch(Updater):
    """An updater that takes one minibatch of each batch: all minibatches take alike, and most of a probe's time."""

    small: bool = False

    @classmethod
    def like(cls, updater: Updater, small: bool) -> "OneMinibatch":
        """The same updater otherwise; `small` is what a policy of full depth is to it."""
        return cls(**{part.name: getattr(updater, part.name) for part in fields(updater)}, small=small)

    @property
    def _small(self) -> bool:
        return self.small

    def update(self, batch: TrainingBatch, *arguments: Any, **named: Any) -> dict[str, float]:
        """One optimizer step, on rows of all lengths."""
        lengths = batch.prompt_mask.sum(1) + batch.response_mask.sum(1)
        every = max(1, batch.size // self.schedule.minibatch_size)
        rows = lengths.argsort(stable=True)[every // 2 :: every]
        return super().update(select_rows(batch, rows.tolist()), *arguments, **named)


def _ends(parts: TrainingSetup, response_tokens: int | None) -> list[int]:
    """End tokens for answers of this mean length: a random model chooses all tokens about equally often."""
    if response_tokens is None or response_tokens >= parts.config.rollout.max_response_tokens:
        return [-1]
    vocabulary = parts.actor_critic.policy.config.get_text_config().vocab_size
    return list(range(max(1, round(vocabulary / response_tokens))))


def _no_opinion(completions: list[str], **_: Any) -> list[float]:
    """In the place of scorers that are no models."""
    return [float(len(text) % 2) for text in completions]


@dataclass
class Watched(RunState):
    """A run's state that also notes the largest memory of each phase, and counts the seconds of its own work."""

    peaks: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        watch = _watch_gpu() if torch.cuda.is_available() else _watch_process()
        with watch as peak:
            began = _work()
            yield
            self.seconds[phase] = _since(began)
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), peak[0])


def _work() -> tuple[float, ...]:
    """Seconds of work so far: of the threads that take longest, and of all together, shared out among processors.

    Unlike those of a clock they do not grow where other programs want the processor. A GPU works by itself.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return (time.perf_counter(),)
    processors = min(torch.get_num_threads(), os.cpu_count() or 1)
    return seconds_of_work(), time.process_time() / processors


def _since(began: tuple[float, ...]) -> float:
    """Seconds of work since then: a phase takes either at least."""
    return max(now - then for now, then in zip(_work(), began, strict=True))


@contextmanager
def _watch_gpu() -> Iterator[list[float]]:
    peak = [0.0]
    torch.cuda.reset_peak_memory_stats()
    yield peak
    peak[0] = float(torch.cuda.max_memory_allocated())


@contextmanager
def _watch_process() -> Iterator[list[float]]:
    """The resident memory, looked at again and again; where the system does not tell, the peak since the start.

    The process's own peak is of no use here: what its imports took for a moment does not grow with the layers.
    """
    peak, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(INTERVAL):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
    peak[0] = max(peak[0], _resident())


def _resident() -> float:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return float(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1.0 if sys.platform == "darwin" else 1024.0)
