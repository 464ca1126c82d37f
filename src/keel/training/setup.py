"""TrainingSetup: models, prompts, scorers and settings of a training run, built before the loop."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from keel.config import TrainConfig
from keel.data.batches import Rollouts, ScoredRollouts
from keel.data.prompts import Prompt, rows_of_varied_length
from keel.errors import ConfigError
from keel.learn.algorithms import ALGORITHMS, Algorithm
from keel.learn.guard import Guard
from keel.learn.optim import build_optimizer
from keel.learn.shaping import Shaping
from keel.learn.targets import TargetSettings
from keel.learn.update import Objective, Updater, UpdateSchedule
from keel.models.actor_critic import ActorCritic
from keel.models.adapters import share_frozen_weights
from keel.models.gradients import require_gradients
from keel.models.heads import trunk
from keel.models.layers import recompute_layers
from keel.models.loading import end_token_ids, load_causal_lm, stop_texts
from keel.models.positions import require_positions
from keel.models.prompt_reading import chat_tokenizer, end_responses_at_turns, read_prompts
from keel.models.vocabulary import report_unembedded_ids, require_embeddings
from keel.rollout.function_scorer import FunctionScorer
from keel.rollout.sampler import sample_rollouts
from keel.rollout.score import score
from keel.rollout.scorers import RewardModelScorer, Scorer, build_scorers, check_signatures
from keel.run.reward_files import read_range, require_gate_pass
from keel.terminal import print_line
from keel.training.critic import build_actor_critic
from keel.training.python_prompts import load_training_prompts
from keel.world import World, generator

DEFAULT_CRITIC_RATE = 3.0  # times the policy's: the value head starts at zero and must follow a moving policy


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
    stop_texts: tuple[str, ...] = ()  # texts of several tokens that end a response as the end tokens do
    failed: set[str] = field(default_factory=set)  # scorers whose first failure has been reported

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
        config, rollout = self.config, self.config.rollout
        if prompts is None:
            prompts = prompts_of_step(self.prompts, config.seed, step, rollout.batch_size, rollout.group_size or 1)
        numbers = torch.rand(
            (len(prompts), rollout.max_response_tokens),
            generator=generator(config.seed, purpose, step),
            dtype=torch.float64,
        )
        share = self.world.share(len(prompts))
        prompts, numbers = prompts[share], numbers[share]
        if at_most is not None:
            chosen = rows_of_varied_length(prompts, at_most)
            prompts, numbers = [prompts[row] for row in chosen], numbers[chosen]
        numbers = numbers[:, :max_tokens]
        return sample_rollouts(
            self.actor_critic.policy,
            list(prompts),
            self.tokenizer,
            numbers,
            self.end_ids,
            rollout.temperature,
            stop_in_text=rollout.stop_in_text,
            stop_texts=self.stop_texts,
        )

    def score(self, rollouts: Rollouts, steps_done: int | None = None) -> ScoredRollouts:
        """Score responses, and report the first failure of each scorer.

        Args:
            steps_done: number of finished steps, which reward functions can read; None keeps the last number.

        Raises RewardError.
        """
        reward = self.config.reward
        for scorer in self.scorers:
            if isinstance(scorer, FunctionScorer) and steps_done is not None:
                scorer.progress = (steps_done, self.config.steps)
        scored = score(rollouts, self.scorers, self.tokenizer, reward.segments, reward.on_failure)
        for name, cause in scored.failures.items():
            if name not in self.failed:
                self.failed.add(name)
                print_line(f"warning: scorer {name} failed, and the responses are dropped (reward.on_failure): {cause}")
        return scored


def prompts_of_step(prompts: list[Prompt], seed: int, step: int, batch_size: int, group_size: int) -> list[Prompt]:
    """Return the prompts of a step, each `group_size` times.

    Every pass over the data is a new shuffle, and no prompt is left out of it.
    """
    count = batch_size // group_size
    chosen: list[Prompt] = []
    for position in range((step - 1) * count, step * count):
        epoch, row = divmod(position, len(prompts))
        if row == 0 or not chosen:
            order = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
        chosen += [prompts[order[row]]] * group_size
    return chosen


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
    loaded = load_training_prompts(config.prompts, tokenizer, prompts)
    held_out = read_prompts(config.prompts, tokenizer, path) if (path := config.evaluate.prompts) else []
    scorers = _scorers(config, functions) if scores_required or config.rewards or functions else []
    check_signatures(scorers, (n for p in [*loaded, *held_out] for n in p.columns), config.reward.segments != "none")
    _check_sizes(config, world)
    policy = _policy(config, tokenizer, world)
    _check_lengths(config, policy, [*loaded, *held_out])
    report_unembedded_ids(policy, tokenizer, config.policy.model)
    require_embeddings(policy, [prompt.tokens for prompt in [*loaded, *held_out]], tokenizer, config.prompts.path)
    end_ids = end_token_ids(policy, tokenizer, config.rollout.stop)
    if not end_ids:
        raise ConfigError("the model has no end token", where=config.policy.model, fix="set rollout.stop")
    algorithm = ALGORITHMS[config.algorithm.name]
    actor_critic = build_actor_critic(config, policy, algorithm, tokenizer).to(world.device)
    if config.policy.gradient_checkpointing:
        for model in filter(None, (actor_critic.policy, actor_critic.critic)):
            recompute_layers(trunk(model))
    reference = _reference(config, actor_critic, world)
    for scorer in scorers:
        for member in scorer.members if isinstance(scorer, RewardModelScorer) else []:
            share_frozen_weights(member.model, reference.policy if reference else policy)
    return TrainingSetup(
        config=config,
        world=world,
        tokenizer=tokenizer,
        end_ids=end_ids,
        stop_texts=tuple(stop_texts(tokenizer, config.rollout.stop)),
        prompts=loaded,
        held_out=held_out,
        actor_critic=actor_critic,
        reference=reference,
        scorers=scorers,
        ranges=_ranges(config, scorers),
        algorithm=algorithm,
        shaping=Shaping(config.reward.missing_eos_penalty, config.reward.clip, config.reward.normalize),
        targets=_target_settings(config),
        updater=_updater(config, actor_critic, algorithm, world),
    )


def _policy(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, world: World) -> Any:
    torch.manual_seed(config.seed)  # for the random initial weights of the LoRA adapter
    settings = config.policy
    policy = load_causal_lm(settings.model, settings.dtype, settings.lora, settings.quantization).to(world.device)
    require_gradients(policy, settings.model)
    end_responses_at_turns(policy, tokenizer, config.prompts)
    return policy


def _scorers(config: TrainConfig, functions: Sequence[Callable[..., Any]]) -> list[Scorer]:
    """Build the scorers. Raises ConfigError for a reward model that failed its gate."""
    for reward in config.rewards:
        if reward.model:
            require_gate_pass(reward.model, reward.ungated)
    return build_scorers(config.rewards, functions)


def _ranges(config: TrainConfig, scorers: Sequence[Scorer]) -> dict[str, dict[str, float]]:
    pairs = zip(scorers, config.rewards, strict=False)  # functions passed in Python come last and have no source
    ranges = {scorer.name: read_range(source.model) for scorer, source in pairs if source.model}
    return {name: limits for name, limits in ranges.items() if limits is not None}


def _check_sizes(config: TrainConfig, world: World) -> None:
    group_size, minibatch_size = config.rollout.group_size or 1, config.algorithm.minibatch_size or 1
    if config.rollout.batch_size % (world.size * group_size) or minibatch_size % world.size:
        raise ConfigError(
            f"rollout.batch_size {config.rollout.batch_size} (in groups of {group_size}) and algorithm.minibatch_size "
            f"{minibatch_size} cannot be divided among {world.size} processes",
            fix=f"make rollout.batch_size a multiple of {world.size * group_size} and algorithm.minibatch_size one of "
            f"{world.size}",
        )


def _check_lengths(config: TrainConfig, policy: Any, prompts: Sequence[Prompt]) -> None:
    longest = max(len(prompt.tokens) for prompt in prompts)
    require_positions(policy, longest, config.rollout.max_response_tokens, config.policy.model, "rollout")


def _reference(config: TrainConfig, actor_critic: ActorCritic, world: World) -> ActorCritic | None:
    """Return the frozen reference model; None where no KL is measured.

    With LoRA and without `reference`, it shares the weights of the policy, whose adapter is switched off for it.
    """
    if not config.measures_kl:
        return None
    if config.policy.lora and config.reference is None:
        return ActorCritic(actor_critic.policy)
    if config.reference is None:
        # A copy in memory is faster than a second look at the disk, and cannot differ from the start.
        return ActorCritic(copy.deepcopy(actor_critic.policy).requires_grad_(False))
    model = load_causal_lm(config.reference, config.policy.dtype).to(world.device)
    if model.config.get_text_config().vocab_size != actor_critic.policy.config.get_text_config().vocab_size:
        raise ConfigError(
            "the vocabulary of the reference differs from the policy's",
            where=config.reference,
            fix="name a reference with the policy's tokenizer",
        )
    return ActorCritic(model.requires_grad_(False))


def _updater(config: TrainConfig, actor_critic: ActorCritic, algorithm: Algorithm, world: World) -> Updater:
    optim = config.optim
    critic_rate = optim.critic_learning_rate or DEFAULT_CRITIC_RATE * optim.learning_rate
    groups = [(actor_critic.policy_parameters(), optim.learning_rate), (actor_critic.critic_parameters(), critic_rate)]
    return Updater(
        actor_critic=actor_critic,
        optimizer=build_optimizer(groups, optim.weight_decay, optim.eps),
        algorithm=algorithm,
        objective=Objective(
            temperature=config.rollout.temperature,
            clip_range_low=config.algorithm.clip_range_low,
            clip_range_high=config.algorithm.clip_range_high,
            dual_clip=config.algorithm.dual_clip,
            value_clip_range=config.algorithm.value_clip_range,
            value_coef=config.algorithm.value_coef,
            entropy_coef=config.algorithm.entropy_coef,
            kl_in=config.algorithm.kl_in,
            kl_estimator=str(config.algorithm.kl_estimator),
        ),
        schedule=UpdateSchedule(
            update_epochs=config.algorithm.update_epochs or 1,
            minibatch_size=config.algorithm.minibatch_size or config.rollout.batch_size,
            microbatch_tokens=config.algorithm.microbatch_tokens,
            max_approx_kl=config.algorithm.max_approx_kl,
            max_grad_norm=optim.max_grad_norm,
            schedule=optim.schedule,
            warmup_steps=optim.warmup_steps,
            total_steps=config.steps,
        ),
        world=world,
        guard=Guard(optim.on_fault, optim.max_skips, optim.spike),
    )


def _target_settings(config: TrainConfig) -> TargetSettings:
    return TargetSettings(
        temperature=config.rollout.temperature,
        group_size=config.rollout.group_size or 1,
        microbatch_tokens=config.algorithm.microbatch_tokens,
        kl_in=config.algorithm.kl_in,
        kl_estimator=str(config.algorithm.kl_estimator),
        gamma=config.algorithm.gamma,
        gae_lambda=config.algorithm.gae_lambda,
        whiten_advantages=config.algorithm.whiten_advantages,
        normalize_std=config.algorithm.normalize_std,
        truncation=config.algorithm.truncation,
    )
