"""Build the critic of a run: a value head on the policy's trunk, or a separate model."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.config import TrainConfig
from keel.errors import ConfigError
from keel.learn.algorithms import Algorithm
from keel.models.actor_critic import ActorCritic
from keel.models.adapters import share_frozen_weights, with_lora
from keel.models.ensemble import member_folders
from keel.models.heads import new_value_head, trunk
from keel.models.layers import recompute_layers
from keel.models.loading import classifier_on_base, load_classifier, load_tokenizer
from keel.models.pad_token import set_pad_id
from keel.models.sharding import shard_head, shard_model
from keel.models.trunk_classifier import has_score_head
from keel.world import World


def build_actor_critic(
    config: TrainConfig, policy: Any, algorithm: Algorithm, tokenizer: PreTrainedTokenizerBase, world: World
) -> ActorCritic:
    """Return the policy with the critic that the algorithm needs, if any, divided among the processes of the world.

    Raises ConfigError for a critic that could not be saved as a sequence classifier.
    """
    if not algorithm.needs_critic:
        return ActorCritic(shard_model(policy, world))
    is_shared = config.critic.sharing == "shared"
    source = config.policy.model if is_shared else _source(config)
    if source == config.policy.model and not has_score_head(policy.config):
        raise ConfigError("only a decoder can be a critic", config.policy.model, "use reinforce, rloo or grpo")
    if is_shared:
        head = shard_head(new_value_head(policy), world)
        return ActorCritic(shard_model(policy, world), value_head=head)
    critic = _critic(config, source, policy, tokenizer, share_base=world.mesh is None)
    if config.policy.gradient_checkpointing:
        recompute_layers(trunk(critic))
    critic = shard_model(critic, world)
    return ActorCritic(shard_model(policy, world), critic)


def _critic(config: TrainConfig, source: str, policy: Any, tokenizer: PreTrainedTokenizerBase, share_base: bool) -> Any:
    """Load the critic.

    Args:
        share_base: let the critic of an adapter share the frozen weights of the policy's base.
    """
    settings = config.policy
    if settings.lora and source == settings.model:
        critic = classifier_on_base(policy)
        set_pad_id(critic, int(tokenizer.pad_token_id))
        return with_lora(critic, settings.lora, "SEQ_CLS")
    critic = load_classifier(source, settings.dtype, config.seed, to_train=True)
    if not hasattr(critic, "score"):
        raise ConfigError("only a decoder can be a critic", where=source, fix="set critic.init to policy")
    if source != settings.model and not vocabulary_within(tokenizer, load_tokenizer(source)):
        raise ConfigError(
            "the critic's vocabulary differs from the policy's", where=source, fix="set critic.init to policy"
        )
    set_pad_id(critic, int(tokenizer.pad_token_id))  # the critic is saved with the policy's tokenizer
    if settings.lora:
        critic = with_lora(critic, settings.lora, "SEQ_CLS", settings.quantization)
        if share_base:
            share_frozen_weights(critic, policy)
    return critic


def _source(config: TrainConfig) -> str:
    """Return the folder or hub id of the critic's initial trunk. Of an ensemble, it is the first member."""
    source = config.critic.init
    if source == "policy":
        source = config.policy.model
    elif source == "reward":
        models = [reward.model for reward in config.rewards if reward.model]
        if not models:
            raise ConfigError(
                "there is no reward model to start from", where="critic.init", fix="set it to policy or to a folder"
            )
        source = str(models[0])
    return member_folders(source)[0]


def vocabulary_within(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether the other tokenizer has every token under the same id. Reward models may have one more, the pad token."""
    return tokenizer.get_vocab().items() <= other.get_vocab().items()
