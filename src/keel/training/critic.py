"""The critic of a run: a head on the policy's trunk, or a model of its own."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.config import TrainConfig
from keel.errors import ConfigError
from keel.learn.algorithms import Algorithm
from keel.models.actor_critic import ActorCritic
from keel.models.adapters import share_frozen_weights, with_lora
from keel.models.ensemble import member_folders
from keel.models.heads import new_value_head
from keel.models.loading import load_classifier, load_tokenizer
from keel.models.pad_token import set_pad_id
from keel.models.trunk_classifier import has_score_head


def build_actor_critic(
    config: TrainConfig, policy: Any, algorithm: Algorithm, tokenizer: PreTrainedTokenizerBase
) -> ActorCritic:
    """The policy and the critic that the algorithm needs. Raises ConfigError for one that could not be saved."""
    if not algorithm.needs_critic:
        return ActorCritic(policy)
    if config.critic.sharing == "shared":
        if not has_score_head(policy.config):
            raise ConfigError("only a decoder can be a critic", config.policy.model, "use reinforce, rloo or grpo")
        return ActorCritic(policy, value_head=new_value_head(policy))
    return ActorCritic(policy, critic=_critic(config, policy, tokenizer))


def _critic(config: TrainConfig, policy: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    source = config.critic.init
    if source == "policy":
        source = config.policy.model
    elif source == "reward":
        models = [reward.model for reward in config.rewards if reward.model]
        if not models:
            raise ConfigError("there is no reward model to start from", where="critic.init", fix="policy, or a folder")
        source = str(models[0])
    source = member_folders(source)[0]
    critic = load_classifier(source, config.policy.dtype, config.seed, to_train=True)
    if not hasattr(critic, "score"):
        fix = "use reinforce, rloo or grpo" if config.critic.init == "policy" else "set critic.init to policy"
        raise ConfigError("only a decoder can be a critic", where=source, fix=fix)
    if source != config.policy.model and not vocabulary_within(tokenizer, load_tokenizer(source)):
        raise ConfigError("its vocabulary is not the policy's", where=source, fix="set critic.init to policy")
    set_pad_id(critic, int(tokenizer.pad_token_id))  # it is saved with the policy's tokenizer
    if config.policy.lora:
        critic = with_lora(critic, config.policy.lora, "SEQ_CLS")
        share_frozen_weights(critic, policy)
    return critic


def vocabulary_within(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether the other tokenizer has every token under the same id; a reward model may have a pad token besides."""
    return tokenizer.get_vocab().items() <= other.get_vocab().items()
