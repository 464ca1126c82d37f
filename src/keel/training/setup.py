"""TrainingSetup: models, prompts, scorers and settings of a training run, built before the loop."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from keel.config import TrainConfig
from keel.data.batches import Rollouts, ScoredRollouts, no_rollouts
from keel.data.prompts import Prompt, rows_of_varied_length
from keel.errors import ConfigError
from keel.learn.algorithms import ALGORITHMS, Algorithm
from keel.learn.shaping import Shaping
from keel.learn.targets import TargetSettings
from keel.learn.update import Updater
from keel.models.actor_critic import ActorCritic
from keel.models.adapters import share_frozen_weights
from keel.models.gradients import require_gradients
from keel.models.heads import trunk
from keel.models.layers import recompute_layers
from keel.models.loading import end_token_ids, load_causal_lm, stop_texts
from keel.models.positions import require_positions
from keel.models.prompt_reading import chat_tokenizer, end_responses_at_turns, read_prompts
from keel.models.sharding import gathered_weights, shard_model
from keel.models.vocabulary import report_unembedded_ids, require_embeddings
from keel.rollout.engine import Draws, Engine
from keel.rollout.function_scorer import FunctionScorer
from keel.rollout.score import score
from keel.rollout.scorers import RewardModelScorer, Scorer, build_scorers, check_signatures
from keel.run.reward_files import read_range, require_gate_pass
from keel.terminal import print_line
from keel.training.critic import build_actor_critic
from keel.training.engine_setup import build_engine
from keel.training.prompt_order import Mixture, draw_prompts
from keel.training.python_prompts import load_training_prompts
from keel.training.update_setup import build_updater, target_settings
from keel.world import ALONE, World


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that stays the same through a training run."""

    config: TrainConfig
    world: World
    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]
    prompts: list[Prompt]
    held_out: list[Prompt]  # for evaluations during the run; may be empty
    actor_critic: ActorCritic
    reference: ActorCritic | None
    scorers: list[Scorer]
    ranges: dict[str, dict[str, float]]  # range.json of the reward models that have one, by the scorer's name
    algorithm: Algorithm
    shaping: Shaping
    targets: TargetSettings
    updater: Updater
    engine: Engine
    mixture: Mixture | None = None  # of the files of prompts; None: all prompts are drawn equally often
    stop_texts: tuple[str, ...] = ()  # texts of several tokens that end a response as the end tokens do
    failed: set[str] = field(default_factory=set)  # scorers whose first failure has been reported

    @property
    def reward_models(self) -> list[Any]:
        """The models of all scorers."""
        return scoring_models(self.scorers)

    def respond(
        self,
        step: int,
        purpose: str = "sample",
        at_most: int | None = None,
        max_tokens: int | None = None,
        prompts: Sequence[Prompt] | None = None,
    ) -> Rollouts:
        """Sample this process's share of a step's responses, which depend on seed and step alone.

        Args:
            purpose: name of the stream of random numbers.
            at_most: number of prompts to sample for, chosen to differ in length; by default all.
            max_tokens: longest response, where it is below `rollout.max_response_tokens`.
            prompts: one for each response, in place of the step's prompts.
        """
        config = self.config
        if prompts is None:
            prompts = self.step_prompts(step)
        rows: Sequence[int] = range(len(prompts))[self.world.share(len(prompts))]
        if at_most is not None:
            rows = [rows[row] for row in rows_of_varied_length([prompts[row] for row in rows], at_most)]
        draws = Draws((config.seed, purpose, step), len(prompts), rows)
        return self.sample([prompts[row] for row in rows], draws, max_tokens)

    def step_prompts(self, step: int, extra: int = 0) -> list[Prompt]:
        """Return the prompts of a step, of all processes, each `rollout.group_size` times.

        Args:
            extra: number of prompts that earlier steps drew in addition to those of their batches.
        """
        group_size = self.config.rollout.group_size or 1
        count = self.config.rollout.batch_size // group_size
        drawn = self.draw_prompts((step - 1) * count + extra, count)
        return [prompt for prompt in drawn for _ in range(group_size)]

    def draw_prompts(self, first: int, count: int) -> list[Prompt]:
        """Return `count` prompts in the order of the run, from position `first` on."""
        return draw_prompts(self.prompts, self.config.seed, first, count, self.mixture)

    def sample(self, prompts: Sequence[Prompt], draws: Draws, max_tokens: int | None = None) -> Rollouts:
        """Sample one response to each prompt with these random numbers. Every process must call it.

        There may be no prompts: other processes then have some.
        """
        policy, head = self.actor_critic.policy, self.actor_critic.value_head
        with gathered_weights(*self.actor_critic.models_read(head is not None, True)):
            if not prompts:
                return no_rollouts(self.world.device)
            return self.engine.sample(policy, prompts, draws, self.end_ids, max_tokens, head)

    def score(self, rollouts: Rollouts, steps_done: int | None = None, together: bool = True) -> ScoredRollouts:
        """Score responses, and report the first failure of each scorer.

        Args:
            steps_done: number of finished steps, which reward functions can read; None keeps the last number.
            together: whether every process makes this call, with its share of the responses.

        Raises RewardError, on every process if `together`.
        """
        reward = self.config.reward
        for scorer in self.scorers:
            if isinstance(scorer, FunctionScorer) and steps_done is not None:
                scorer.progress = (steps_done, self.config.steps)
        world = self.world if together else ALONE
        scored = score(rollouts, self.scorers, self.tokenizer, reward.segments, reward.on_failure, world)
        for name, cause in scored.failures.items():
            if name not in self.failed:
                self.failed.add(name)
                print_line(f"warning: scorer {name} failed, and the responses are dropped (reward.on_failure): {cause}")
        return scored


def scoring_models(scorers: Sequence[Scorer]) -> list[Any]:
    return [member.model for scorer in scorers if isinstance(scorer, RewardModelScorer) for member in scorer.members]


def build_training_setup(
    config: TrainConfig,
    functions: Sequence[Callable[..., Any]],
    prompts: Any,
    world: World,
    scores_required: bool = True,
) -> TrainingSetup:
    """Load prompts, models and scorers, and check that they fit together.

    Args:
        functions: Python reward functions in addition to `config.rewards`.
        prompts: replace the file of `config.prompts`; None reads the file.
        scores_required: False allows a run without a scorer, for callers that compute the scores.

    Raises ConfigError or DataError.
    """
    tokenizer = chat_tokenizer(config.policy.model, config.prompts)
    loaded, mixture = load_training_prompts(config.prompts, tokenizer, prompts)
    held_out = read_prompts(config.prompts, tokenizer, path) if (path := config.evaluate.prompts) else []
    _check_sizes(config, world)
    scored = scores_required or bool(config.rewards or functions)
    load = partial(_load_models, config, functions if scored else None, tokenizer, [*loaded, *held_out], world)
    actor_critic, reference, scorers, end_ids = world.in_turn(load)
    algorithm = ALGORITHMS[config.algorithm.name]
    texts = tuple(stop_texts(tokenizer, config.rollout.stop))
    return TrainingSetup(
        config=config,
        world=world,
        tokenizer=tokenizer,
        end_ids=end_ids,
        engine=build_engine(config, tokenizer, texts, [*loaded, *held_out], world),
        stop_texts=texts,
        prompts=loaded,
        mixture=mixture,
        held_out=held_out,
        actor_critic=actor_critic,
        reference=reference,
        scorers=scorers,
        ranges=_ranges(config, scorers),
        algorithm=algorithm,
        shaping=Shaping(
            config.reward.missing_eos_penalty,
            config.reward.clip,
            config.reward.normalize,
            config.rollout.max_response_tokens,
            config.reward.overlong_tokens,
            config.reward.overlong_penalty,
        ),
        targets=target_settings(config),
        updater=build_updater(config, actor_critic, algorithm, world),
    )


def _load_models(
    config: TrainConfig,
    functions: Sequence[Callable[..., Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    world: World,
) -> tuple[ActorCritic, ActorCritic | None, list[Scorer], list[int]]:
    """Load policy, critic, reference and scorers, check that they fit together, and divide them among the processes.

    Each model is divided before the next is loaded, except that policy and reference are copies of each other.

    Args:
        functions: None builds no scorers.

    Returns also the ids that end a response.
    """
    scorers = [] if functions is None else _scorers(config, functions)
    check_signatures(scorers, (name for prompt in prompts for name in prompt.columns), config.reward.segments != "none")
    reward_models = scoring_models(scorers)
    if world.mesh is not None:
        for model in reward_models:
            shard_model(model, world)
    policy = _policy(config, tokenizer, world)
    _check_lengths(config, policy, prompts)
    report_unembedded_ids(policy, tokenizer, config.policy.model)
    require_embeddings(policy, [prompt.tokens for prompt in prompts], tokenizer, config.prompts.path)
    end_ids = end_token_ids(policy, tokenizer, config.rollout.stop)
    if not end_ids:
        raise ConfigError("the model has no end token", where=config.policy.model, fix="set rollout.stop")
    reference = _reference(config, policy, world)
    actor_critic = build_actor_critic(config, policy, ALGORITHMS[config.algorithm.name], tokenizer, world)
    if world.mesh is None:  # otherwise each process has few rows of a base
        for model in reward_models:
            share_frozen_weights(model, reference.policy if reference else policy)
    return actor_critic, reference, scorers, end_ids


def _policy(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, world: World) -> Any:
    torch.manual_seed(config.seed)  # for the random initial weights of the LoRA adapter
    settings = config.policy
    policy = load_causal_lm(settings.model, settings.dtype, settings.lora, settings.quantization)
    if world.mesh is None:  # otherwise the device never holds the whole model
        policy = policy.to(world.device)
    require_gradients(policy, settings.model)
    end_responses_at_turns(policy, tokenizer, config.prompts)
    if config.policy.gradient_checkpointing:
        recompute_layers(trunk(policy))
    return policy


def _scorers(config: TrainConfig, functions: Sequence[Callable[..., Any]]) -> list[Scorer]:
    """Build the scorers. Raises ConfigError for a reward model that failed its gate."""
    for reward in config.rewards:
        if reward.model:
            require_gate_pass(reward.model, reward.ungated)
    return build_scorers(config.rewards, functions, config.rollout.group_size or 1)


def _ranges(config: TrainConfig, scorers: Sequence[Scorer]) -> dict[str, dict[str, float]]:
    pairs = zip(scorers, config.rewards, strict=False)  # functions passed in Python come last and have no source
    ranges = {scorer.name: read_range(source.model) for scorer, source in pairs if source.model}
    return {name: limits for name, limits in ranges.items() if limits is not None}


def _check_sizes(config: TrainConfig, world: World) -> None:
    step = world.size * (config.rollout.group_size or 1)
    if config.rollout.batch_size % step:
        raise ConfigError(
            f"{config.rollout.batch_size} responses, in groups of {config.rollout.group_size or 1}, cannot be divided "
            f"among {world.size} processes",
            where="rollout.batch_size",
            fix=f"make it a multiple of {step}",
        )


def _check_lengths(config: TrainConfig, policy: Any, prompts: Sequence[Prompt]) -> None:
    longest = max(len(prompt.tokens) for prompt in prompts)
    require_positions(policy, longest, config.rollout.max_response_tokens, config.policy.model, "rollout")


def _reference(config: TrainConfig, policy: Any, world: World) -> ActorCritic | None:
    """Return the frozen reference model; None where no KL is measured.

    With LoRA and without `reference`, it shares the weights of the policy, whose adapter is switched off for it.
    """
    if not config.measures_kl:
        return None
    if config.policy.lora and config.reference is None:
        return ActorCritic(policy)
    if config.reference is None:
        # A copy in memory is faster than a second look at the disk, and cannot differ from the start.
        return ActorCritic(shard_model(copy.deepcopy(policy).requires_grad_(False), world))
    model = load_causal_lm(config.reference, config.policy.dtype)
    if model.config.get_text_config().vocab_size != policy.config.get_text_config().vocab_size:
        raise ConfigError(
            "the vocabulary of the reference differs from the policy's",
            where=config.reference,
            fix="name a reference with the policy's tokenizer",
        )
    return ActorCritic(shard_model(model.requires_grad_(False), world))
