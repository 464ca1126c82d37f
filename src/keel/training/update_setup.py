"""The updates of a training run and their targets, from its settings."""

from keel.config import TrainConfig
from keel.learn.algorithms import Algorithm
from keel.learn.guard import Guard
from keel.learn.optim import build_optimizer
from keel.learn.targets import TargetSettings
from keel.learn.update import Objective, Updater, UpdateSchedule
from keel.models.actor_critic import ActorCritic
from keel.training.engine_setup import correction_cap
from keel.world import World

DEFAULT_CRITIC_RATE = 3.0  # times the policy's: the value head starts at zero and must follow a moving policy


def build_updater(config: TrainConfig, actor_critic: ActorCritic, algorithm: Algorithm, world: World) -> Updater:
    """Return what updates policy and critic, with their optimizer."""
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
            loss_aggregation=config.algorithm.loss_aggregation,
            ratio_level=config.algorithm.ratio_level,
            clip_target=config.algorithm.clip_target,
            max_response_tokens=config.rollout.max_response_tokens,
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


def target_settings(config: TrainConfig) -> TargetSettings:
    """Return the settings of the targets of the updates."""
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
        correction_cap=correction_cap(config),
    )
