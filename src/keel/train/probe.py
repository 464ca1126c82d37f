"""Some steps of a run, taken to see what they cost, in a process of its own, whose peak memory is theirs."""

import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from keel.config import TrainConfig, parse
from keel.core.kl import RESOLUTION
from keel.errors import ConfigError, KeelError
from keel.train.check import self_check
from keel.train.setup import Parts, build_parts
from keel.train.state import RunState
from keel.train.step import train_step
from keel.world import World

START = "start"  # loading and self-check
STEPS = 4  # at most; the first is slower than those that follow
ENOUGH = 12.0  # seconds of work in a probe, after which two steps have to do
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


def probe_apart(values: Mapping[str, Any], response_tokens: int | None) -> Cost:
    """`probe` in a process of its own. Raises what it raised."""
    given = json.dumps([dict(values), response_tokens, torch.get_num_threads()])
    command = [sys.executable, "-P", "-W", "ignore", "-m", __name__]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the probe failed: {' '.join(done.stderr.split())[-500:]}")
    found = json.loads(done.stdout)
    if "what" in found:
        raise ConfigError(**found)
    return Cost(**found)


def main() -> None:
    """Reads the arguments of `probe` as JSON and writes its result, or what is wrong with them, as JSON."""
    values, response_tokens, threads = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        try:
            found = asdict(probe(values, response_tokens, threads))
        except KeelError as error:
            found = {"what": error.what, "where": error.where, "fix": error.fix}
    print(json.dumps(found))


def probe(values: Mapping[str, Any], response_tokens: int | None, threads: int) -> Cost:
    """Build the run, check it as every run is checked, and take a few steps with answers of the length asked for."""
    torch.set_num_threads(threads)
    began = _work()[0]
    config = parse(TrainConfig, values)
    scorers = [] if config.rewards else [_no_opinion]
    state = Watched(step=0, kl_coef=config.algorithm.kl_coef)
    with state.timed(START):
        parts = build_parts(config, scorers, None, World.single())
        parts = replace(parts, end_ids=_ends(parts, response_tokens))
        state.trust_sampler = self_check(parts)["check/logprob_gap"] <= RESOLUTION
    seconds = []
    for _ in range(STEPS):
        train_step(parts, state)
        seconds.append(dict(state.seconds))
        if len(seconds) > 1 and _work()[0] - began > ENOUGH:
            break
    taken = {phase: [each[phase] for each in seconds] for phase in state.seconds}
    fastest = {phase: min(each[1:]) for phase, each in taken.items()}  # what disturbs a step makes it longer
    return Cost(state.peaks, fastest, {phase: statistics.median(taken[phase]) - fastest[phase] for phase in taken})


def _ends(parts: Parts, response_tokens: int | None) -> list[int]:
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
            self.seconds[phase] = max(now - then for now, then in zip(_work(), began, strict=True))
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), peak[0])


def _work() -> tuple[float, ...]:
    """Seconds of work so far: of all threads together, shared out, and of the main one, which a phase takes at least.

    Unlike those of a clock they do not grow where other programs want the processor. A GPU works by itself.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return (time.perf_counter(),)
    return time.process_time() / torch.get_num_threads(), time.thread_time()


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


if __name__ == "__main__":
    main()
