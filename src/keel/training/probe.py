"""Take a few steps of a run, and measure their memory and time.

The process should do nothing else, since all of its memory is counted as that of the run.
"""

import ctypes
import gc
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from keel.config import TrainConfig, parse
from keel.data.batches import TrainingBatch, select_rows
from keel.learn.update import Updater
from keel.models.shallow import shallow_models
from keel.training.self_check import self_check
from keel.training.setup import TrainingSetup, build_training_setup
from keel.training.state import RunState
from keel.training.trainer import PolicyTrainer, trusts_sampler
from keel.world import World, busy_seconds

START = "start"  # loading and self-check
STEPS = 2, 5  # smallest and largest number; the first step is slower than the others, and does not count
ENOUGH = 3.0  # seconds of work after which the smallest number of steps is enough
INTERVAL = 0.002  # seconds between two readings of the memory


@dataclass(frozen=True)
class Cost:
    """Peak bytes, seconds and the error of the seconds, of the start and of each phase of a step."""

    peaks: dict[str, float]
    seconds: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    microbatches: int = 1  # of one optimizer step

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
    """Return the memory of the last probe to the system, so that the peak of the next one does not include it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has no malloc_trim
        trim(0)


def probe(
    values: Mapping[str, Any], depths: Mapping[str, int], small: bool = False, response_tokens: int | None = None
) -> Cost:
    """Build the run, run its self-check, take a few steps, and return the cost.

    Args:
        values: the run's settings.
        depths: number of layers of each model, by folder or hub id.
        small: whether the updater counts the policy of full depth as small.
        response_tokens: mean length of a response; None for the longest.
    """
    config = parse(TrainConfig, {**values, "steps": max(int(values["steps"]), STEPS[1])})  # the run may have fewer
    scorers = [] if config.rewards else [_score_parity]
    state = Watched(step=0, kl_coef=config.algorithm.kl_coef)
    with shallow_models(depths), state.timed(START):
        setup = build_training_setup(config, scorers, None, World.from_environment())
        updater = OneMinibatch.like(setup.updater, small)
        setup = replace(setup, end_ids=_ends(setup, response_tokens), updater=updater)
        state.trust_sampler = trusts_sampler(setup, self_check(setup))
    trainer = PolicyTrainer(setup)
    trainer.state = state
    began, steps = _work(), list[dict[str, float]]()
    while len(steps) < STEPS[0] or (len(steps) < STEPS[1] and _since(began) < ENOUGH):
        trainer.update_weights(trainer.compute_targets(trainer.score(trainer.sample())))
        steps.append({**state.seconds, "update": state.seconds["update"] * num_minibatches(config)})
    warm = {phase: [each[phase] for each in steps[1:]] for phase in state.seconds}
    warm[START] = [state.seconds[START]]
    fastest = {phase: min(each) for phase, each in warm.items()}  # disturbances only make a step slower
    # The long steps of large models are taken once. They vary by about 3%.
    errors = {
        phase: statistics.median(each) - min(each) if len(each) > 1 else 0.03 * min(each)
        for phase, each in warm.items()
    }
    return Cost(state.peaks, fastest, errors, max(updater.counted, default=1))


def num_minibatches(config: TrainConfig) -> int:
    """Return the number of minibatches in a batch."""
    return max(1, config.rollout.batch_size // (config.algorithm.minibatch_size or config.rollout.batch_size))


@dataclass(frozen=True)
class OneMinibatch(Updater):
    """An updater that uses one minibatch of each batch. All minibatches cost the same, and most of a probe's time."""

    small: bool = False
    counted: list[int] = field(default_factory=list)  # micro-batches of each optimizer step

    @classmethod
    def like(cls, updater: Updater, small: bool) -> "OneMinibatch":
        """Copy an updater. `small` replaces its check of the policy's size, since the probe's policy is shallow."""
        return cls(**{each.name: getattr(updater, each.name) for each in fields(updater)}, small=small)

    @property
    def _small(self) -> bool:
        return self.small

    def _microbatches(self, batch: TrainingBatch, rows: Sequence[int]) -> Iterator[TrainingBatch]:
        self.counted.append(0)
        for microbatch in super()._microbatches(batch, rows):
            self.counted[-1] += 1
            yield microbatch

    def update(self, batch: TrainingBatch, *arguments: Any, **named: Any) -> dict[str, float]:
        """Take one optimizer step, on rows of all lengths."""
        lengths = batch.prompt_mask.sum(1) + batch.response_mask.sum(1)
        every = max(1, batch.size // self.schedule.minibatch_size)
        rows = lengths.argsort(stable=True)[every // 2 :: every]
        return super().update(select_rows(batch, rows.tolist()), *arguments, **named)


def _ends(setup: TrainingSetup, response_tokens: int | None) -> list[int]:
    """Choose end tokens so that responses have this mean length. A random model samples all tokens about equally."""
    if response_tokens is None or response_tokens >= setup.config.rollout.max_response_tokens:
        return [-1]
    vocabulary = setup.actor_critic.policy.config.get_text_config().vocab_size
    return list(range(max(1, round(vocabulary / response_tokens))))


def _score_parity(completions: list[str], **_: Any) -> list[float]:
    """Replace scorers that are not models, at no cost."""
    return [float(len(text) % 2) for text in completions]


@dataclass
class Watched(RunState):
    """A run's state that also records the peak memory of each phase, and counts seconds of work, not of the clock."""

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
    """Return the seconds of work so far: of the slowest threads, and of all threads divided by the processors.

    Unlike clock time, they do not grow when other programs use the processor.
    """
    if torch.cuda.is_available():  # a GPU works asynchronously: wait for it, and use the clock
        torch.cuda.synchronize()
        return (time.perf_counter(),)
    processors = min(torch.get_num_threads(), os.cpu_count() or 1)
    return busy_seconds(), time.process_time() / processors


def _since(began: tuple[float, ...]) -> float:
    """Return the seconds of work since `began`: the larger of the two measures, each of which is a lower bound."""
    return max(now - then for now, then in zip(_work(), began, strict=True))


@contextmanager
def _watch_gpu() -> Iterator[list[float]]:
    peak = [0.0]
    torch.cuda.reset_peak_memory_stats()
    yield peak
    peak[0] = float(torch.cuda.max_memory_allocated())


@contextmanager
def _watch_process() -> Iterator[list[float]]:
    """Measure the peak of the resident memory by reading it in short intervals.

    The system's own peak is used only where it reports no current value. It includes memory that the imports used for a
    moment, which does not grow with the layers.
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
