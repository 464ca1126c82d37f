"""Induce faults that no setting can induce: parts of a run that work at the start, and fail later."""

import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from zoo_functions import PHRASE

from keel.data.batches import Rollouts
from keel.learn.shaping import ScoreStatistics
from keel.rollout.score_check import NoScore, Score
from keel.rollout.scorers import Scorer
from keel.training import policy
from keel.training.setup import TrainingSetup

Change = Callable[[float, str, bool, int], Score]
"""(score, answer, ended, step) -> what the scorer says instead."""
Fault = Callable[[TrainingSetup], TrainingSetup]


@dataclass
class Clock:
    step: int = 1


@dataclass(frozen=True)
class TimedSetup(TrainingSetup):
    """A TrainingSetup that knows the current step."""

    clock: Clock = field(default_factory=Clock)

    def respond(self, step: int, purpose: str = "sample", at_most: int | None = None) -> Rollouts:
        if purpose == "sample":
            self.clock.step = step
        return super().respond(step, purpose, at_most)


@dataclass
class ChangedScorer:
    """A scorer whose scores differ from those of its model from some step on."""

    scorer: Scorer
    change: Change
    clock: Clock
    noisy: bool = False

    def __post_init__(self) -> None:
        self.name, self.weight = self.scorer.name, self.scorer.weight

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        said = self.scorer(rollouts, segments)
        rows = zip(said, rollouts.texts, rollouts.truncated.tolist(), strict=True)
        return [self.change(score, text, not truncated, self.clock.step) for score, text, truncated in rows]  # type: ignore[arg-type]


def rescored(change: Callable[[], Change], noisy: bool = False) -> Fault:
    """Return the setup with a changed first scorer."""

    def fault(setup: TrainingSetup) -> TrainingSetup:
        timed = TimedSetup(**{part.name: getattr(setup, part.name) for part in fields(setup)})
        first = ChangedScorer(setup.scorers[0], change(), timed.clock, noisy)
        return replace(timed, scorers=[first, *setup.scorers[1:]])

    return fault


def less_for_an_end(penalty: float) -> Change:
    return lambda score, text, ended, step: score - penalty * ended


def more_for_a_phrase(bonus: float) -> Change:
    return lambda score, text, ended, step: score + bonus * (PHRASE in text)


def scaled(factor: float, first_step: int) -> Change:
    return lambda score, text, ended, step: score * (factor if step >= first_step else 1.0)


def noise(deviation: float, seed: int = 0) -> Change:
    draws = random.Random(seed)
    return lambda score, text, ended, step: score + draws.gauss(0.0, deviation)


def failing(share: float) -> Change:
    """Return no score for some responses, always for the same ones."""
    return lambda score, text, ended, step: NoScore("no number") if random.Random(text).random() < share else score


class Drift:
    """Add a part of the first step's deviation to the scores in every step."""

    def __init__(self, share: float, first_step: int) -> None:
        self.share, self.first_step = share, first_step
        self.initial: list[float] = []

    def __call__(self, score: float, text: str, ended: bool, step: int) -> float:
        if step < self.first_step:
            self.initial.append(score)
            return score
        return score + self.share * statistics.pstdev(self.initial) * (step - self.first_step + 1)


@dataclass(frozen=True)
class HotSetup(TrainingSetup):
    """A sampler whose temperature differs from the trainer's, except for the few responses of the self-check."""

    sampling_temperature: float = 1.0

    def respond(self, step: int, purpose: str = "sample", at_most: int | None = None, prompts: Any = None) -> Rollouts:
        if at_most is not None:
            return super().respond(step, purpose, at_most, prompts)
        hot = replace(self, engine=replace(self.engine, temperature=self.sampling_temperature))
        return TrainingSetup.respond(hot, step, purpose)


def hot_sampler(temperature: float) -> Fault:
    return lambda setup: HotSetup(
        **{part.name: getattr(setup, part.name) for part in fields(setup)}, sampling_temperature=temperature
    )


@contextmanager
def induced(fault: Fault | None, statistics_of_start: ScoreStatistics | None) -> Iterator[None]:
    """Inside, `train_policy` builds its setup with the fault, and uses these statistics for the initial policy."""
    build, measure = policy.build_training_setup, policy.PolicyTrainer.measure_reference

    def build_setup(*given: Any) -> TrainingSetup:
        setup: TrainingSetup = build(*given)
        return setup if fault is None else fault(setup)

    def measure_reference(trainer: policy.PolicyTrainer) -> None:
        trainer.state.statistics = statistics_of_start

    policy.build_training_setup = build_setup
    if statistics_of_start is not None:
        policy.PolicyTrainer.measure_reference = measure_reference
    try:
        yield
    finally:
        policy.build_training_setup, policy.PolicyTrainer.measure_reference = build, measure
