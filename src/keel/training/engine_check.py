"""Check that an engine outside the trainer samples from the weights that it is sent.

An engine may report that an update succeeded, and keep some of the old weights. At the start that cannot be seen, since
all weights are equal then. So the check sends a perturbed copy of the policy, then the policy itself, and compares
the log-probabilities of the responses with those of the trainer each time, on the same prompts.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from keel.config import TrainConfig
from keel.core.masked import masked_moments
from keel.data.batches import Rollouts, TrainingBatch
from keel.data.prompts import Prompt, rows_of_varied_length
from keel.errors import ConfigError, EngineError
from keel.learn.pass_check import gaps_are_rounding
from keel.learn.targets import analyze_all
from keel.models.actor_critic import ActorCritic
from keel.models.adapters import merged_copy
from keel.models.vocabulary import num_embeddings
from keel.rollout.engine import Draws
from keel.training.engine_setup import engine_dtype
from keel.training.setup import TrainingSetup
from keel.world import generator

ROWS, TOKENS = 8, 8
NOISE = 0.05, 0.2, 0.8, 3.0
"""Relative sizes of the perturbation that are tried. The weights of an untrained model are small, and need more."""
LEAST_CHANGE = 0.5
"""Mean change of a log-probability, in nats, for which a perturbation is large enough."""
LARGEST_GAP, LARGEST_GAP_16_BIT = 1e-3, 0.15
"""Largest mean difference of a step's log-probs from the trainer's, in float32 and in bfloat16."""
PATIENCE_16_BIT = 2
"""Number of steps in a row with a larger difference that end a run in bfloat16"""
WHERE = "rollout.engine"
USE_OWN = "use rollout.engine: keel"
FIX = f"{USE_OWN}, or another version of vLLM (docs/how-to/vllm.md)"


@dataclass(frozen=True)
class Probe:
    """The prompts and random numbers of the check. All of its batches have the same."""

    setup: TrainingSetup
    prompts: list[Prompt]
    draws: Draws

    def sample(self, model: Any, prompts: list[Prompt] | None = None) -> Rollouts:
        return self.setup.engine.sample(model, prompts or self.prompts, self.draws, self.setup.end_ids, TOKENS)

    def gaps(self, rollouts: Rollouts, model: Any) -> Tensor:
        """Return the differences of the engine's log-probs from those of a model. [N]"""
        targets = self.setup.targets
        analysis = analyze_all(
            ActorCritic(model), rollouts, targets.temperature, targets.microbatch_tokens, with_values=False
        )
        return (analysis.logprobs - rollouts.logprobs)[rollouts.response_mask].abs()

    def follows(self, rollouts: Rollouts, model: Any) -> bool:
        """Whether the engine sampled from these weights."""
        return gaps_are_rounding(self.gaps(rollouts, model), engine_dtype(self.setup.config))


def check_engine(setup: TrainingSetup) -> dict[str, float]:
    """Check that the engine follows the weights, and that its draws repeat. Return the measurements.

    Raises ConfigError with the likely cause.
    """
    if not setup.engine.is_external:
        return {}
    start = time.monotonic()
    try:
        measured = _check_updates(build_probe(setup))
    except EngineError as error:  # at the start nothing is worth another try
        raise ConfigError(error.what, error.where, USE_OWN) from error
    return {**measured, "check/engine_seconds": time.monotonic() - start}


def _check_updates(probe: Probe) -> dict[str, float]:
    """Sample with the policy, a perturbed copy, and the policy again. Return the measurements."""
    setup = probe.setup
    policy = merged_copy(setup.actor_critic.policy)
    first = probe.sample(policy)
    if not probe.follows(first, policy):
        raise _mismatch(probe, first, policy, "samples from another distribution than the policy's", _sampling_causes)
    perturbed, change = perturbed_copy(probe, first, policy)
    moved = probe.sample(perturbed)
    if not probe.follows(moved, perturbed):
        causes = _weight_causes(policy)
        raise _mismatch(probe, moved, perturbed, "does not follow an update that it reported as done", causes)
    again = probe.sample(policy)
    if not probe.follows(again, policy):
        causes = _weight_causes(perturbed)
        raise _mismatch(probe, again, policy, "does not follow the second update of its weights", causes)
    if engine_dtype(setup.config) == torch.float32 and not same_tokens(first, again):
        raise ConfigError("the engine's responses depend on more than weights and seeds", WHERE, FIX)
    gaps = probe.gaps(again, policy)
    return {
        "check/engine_gap": float(gaps.max()),
        "check/engine_gap_mean": float(gaps.mean()),
        "check/engine_change": change,
    }


def build_probe(setup: TrainingSetup) -> Probe:
    """Choose prompts of all lengths from all prompts of the run: only long ones show a stale cache."""
    chosen = rows_of_varied_length(setup.prompts, ROWS)
    prompts = [setup.prompts[row] for row in chosen]
    prompts = [prompts[row % len(prompts)] for row in range(ROWS)]
    return Probe(setup, prompts, Draws((setup.config.seed, "engine"), len(prompts), range(len(prompts))))


def same_tokens(first: Rollouts, second: Rollouts) -> bool:
    return torch.equal(first.response_mask, second.response_mask) and torch.equal(
        first.response_tokens[first.response_mask], second.response_tokens[second.response_mask]
    )


def perturbed_copy(probe: Probe, rollouts: Rollouts, policy: Any) -> tuple[Any, float]:
    """Return a copy of the policy with noise on every weight, and the mean change of a log-probability by it.

    Raises ConfigError if no noise changes the log-probs enough to see whether an engine follows.
    """
    with_true = replace(rollouts, logprobs=_logprobs(probe, rollouts, policy))
    for size in NOISE:
        perturbed = copy.deepcopy(policy).requires_grad_(False)
        numbers = generator(probe.setup.config.seed, "noise")
        for weight in perturbed.parameters():
            noise = torch.randn(weight.shape, generator=numbers).to(weight.device, weight.dtype)
            weight.mul_(1 + size * noise)
        change = float(probe.gaps(with_true, perturbed).mean())
        if change >= LEAST_CHANGE:
            return perturbed, change
    raise ConfigError("the weights of the policy hardly change its log-probabilities", WHERE, "check policy.model")


def _logprobs(probe: Probe, rollouts: Rollouts, model: Any) -> Tensor:
    targets = probe.setup.targets
    return analyze_all(
        ActorCritic(model), rollouts, targets.temperature, targets.microbatch_tokens, with_values=False
    ).logprobs


Causes = Callable[[Probe, Rollouts, Any], str]


def _mismatch(probe: Probe, rollouts: Rollouts, model: Any, what: str, causes: Causes) -> ConfigError:
    gaps = probe.gaps(rollouts, model)
    size = f"log-probabilities differ by {float(gaps.max()):.2g}, mean {float(gaps.mean()):.2g}"
    return ConfigError(f"the engine {what} ({size}): {causes(probe, rollouts, model)}", WHERE, FIX)


def _sampling_causes(probe: Probe, rollouts: Rollouts, model: Any) -> str:
    return "sampling settings of the model's folder, or another computation"


def _weight_causes(previous: Any) -> Causes:
    """Return a function that names the weights that the engine seems to have.

    Args:
        previous: the model whose weights the engine had before.
    """

    def causes(probe: Probe, rollouts: Rollouts, model: Any) -> str:
        if probe.follows(probe.sample(model, _unread(probe.prompts, model)), model):
            return "it uses what it had read of a prompt with the previous weights (prefix cache)"
        if probe.follows(rollouts, previous):
            return "it still has the previous weights"
        if probe.follows(rollouts, with_head(model, previous)):
            return "it still has the previous output matrix (tied embeddings)"
        return "some of its weights are still the previous ones"

    return causes


def _unread(prompts: list[Prompt], model: Any) -> list[Prompt]:
    """Return prompts of the same lengths that the engine has not read yet: with another first token."""
    count = num_embeddings(model)
    return [replace(prompt, tokens=((prompt.tokens[0] + 1) % count, *prompt.tokens[1:])) for prompt in prompts]


def with_head(model: Any, other: Any) -> Any:
    """Return a copy of a model with the output matrix of another, which is not tied any more."""
    mixed = copy.deepcopy(model)
    head = copy.deepcopy(other.get_output_embeddings())
    mixed.set_output_embeddings(head)
    return mixed


class AgreementWatch:
    """End a run whose engine does not sample from the policy any more. A correction must never hide that."""

    def __init__(self, config: TrainConfig) -> None:
        self.is_exact, self.steps = engine_dtype(config) == torch.float32, 0

    def check(self, rollouts: Rollouts, batch: TrainingBatch) -> None:
        """Compare the log-probs of a step. Raises EngineError if they differ too much, for too long."""
        mean, _ = masked_moments((batch.logprobs - rollouts.logprobs).abs(), batch.response_mask)
        gap = float(mean)  # 0 for a batch whose responses were all dropped
        limit = LARGEST_GAP if self.is_exact else LARGEST_GAP_16_BIT
        self.steps = 0 if gap <= limit else self.steps + 1
        if self.steps >= (1 if self.is_exact else PATIENCE_16_BIT):
            raise EngineError(
                f"the engine's log-probabilities differ from the policy's by {gap:.2g} on average, above {limit:g}",
                WHERE,
                "continue with --resume, which starts a new engine",
            )
