"""The policies that an evaluation compares: their names, vocabularies and models."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from keel.config import EvaluateConfig
from keel.errors import ConfigError
from keel.evaluation.endpoint import EndpointPolicy, is_endpoint, load_endpoint, reading_model
from keel.evaluation.evaluated_policy import EvaluatedPolicy
from keel.evaluation.frontier import find_checkpoints
from keel.evaluation.sample import load_frozen_model, load_policy
from keel.evaluation.summary import side_name
from keel.models.actor_critic import ActorCritic
from keel.models.loading import load_tokenizer
from keel.world import World, raise_together


def side_paths(config: EvaluateConfig) -> dict[str, str]:
    """Return the folder or hub id of each side by its name."""
    if config.checkpoints:
        sides = {side_name(step): folder for step, folder in find_checkpoints(config.checkpoints).items()}
    else:
        names = ["policy"] if len(config.policy) == 1 else short_names(config.policy)
        sides = dict(zip(names, config.policy, strict=True))
    return sides | ({"against": config.against} if config.against else {})


def short_names(paths: Sequence[str]) -> list[str]:
    """Shorten paths to names that differ, such as `ppo` for runs/ppo/policy.

    A name is the shortest ending of the path that is unique, without the last parts that all paths have in common.
    """
    parts = [Path(path).parts for path in paths]
    while len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len({*names, "against", "prompt"}) == len(names) + 2:  # both are keys of the output
            return names
    return [str(Path(path).absolute()) for path in paths]


def check_vocabularies(config: EvaluateConfig, sides: Mapping[str, str]) -> dict[str, bool]:
    """Check whether the reference has the vocabulary of each side. A side with another vocabulary gets no KL.

    Raises ConfigError for a `reference` with another vocabulary, and where sides would drop different prompts.
    """
    local = {side: folder for side, folder in sides.items() if not is_endpoint(folder)}
    vocabularies = {side: load_tokenizer(folder).get_vocab() for side, folder in local.items()}
    first = next(iter(vocabularies.values()), None)
    if config.prompt_settings.too_long == "drop" and any(vocabulary != first for vocabulary in vocabularies.values()):
        raise ConfigError(
            "models with different vocabularies would drop different prompts",
            where="prompts.too_long",
            fix="set it to truncate",
        )
    name = config.reference or (None if is_endpoint(config.against) else config.against)
    expected = load_tokenizer(name).get_vocab() if name else None
    same = {side: vocabulary == expected for side, vocabulary in vocabularies.items()}
    same |= dict.fromkeys(sides.keys() - local.keys(), False)
    if config.reference and not all(same[side] for side in local):
        raise ConfigError(
            "the reference's vocabulary differs from that of the policies, so there is no KL",
            where=f"reference {name}",
            fix="name a reference with the policies' tokenizer, or remove the setting",
        )
    return same


def load_reference(
    config: EvaluateConfig, opponents: Mapping[str, EvaluatedPolicy | EndpointPolicy], world: World
) -> ActorCritic | None:
    """Return the reference model of the KL, by default that of `against`; None without either."""
    if config.reference and config.reference != config.against:
        return cast(ActorCritic, world.in_turn(partial(load_frozen_model, config.reference, config.dtype)))
    against = opponents.get("against")
    return against.model if isinstance(against, EvaluatedPolicy) else None


def load_side(
    config: EvaluateConfig, sides: Mapping[str, str], world: World, name: str
) -> EvaluatedPolicy | EndpointPolicy:
    """Load a policy from a folder or the hub, or check the address of an endpoint. Raises ConfigError."""
    if not is_endpoint(name):
        return load_policy(name, config.prompt_settings, config.sampling, config.dtype, world)
    tokenizer = reading_model([config.tokenizer, *sides.values(), config.reference])
    return raise_together(world, partial(load_endpoint, name, tokenizer, config.prompt_settings, config.sampling))
