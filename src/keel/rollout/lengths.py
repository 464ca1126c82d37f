"""Whether reward models can read the texts they will be asked to score, checked before anything is sampled."""

from collections.abc import Iterator, Sequence

from keel.data.prompts import Prompt
from keel.errors import ConfigError
from keel.models.reward_model import RewardModel
from keel.rollout.scorers import RewardModelScorer, Scorer

COUNTED = 256
"""How many of the longest prompts are tokenized again for each reward model."""
SHORTEST = "."  # a response of one token


def length_warnings(scorers: Sequence[Scorer], prompts: Sequence[Prompt], max_response_tokens: int) -> list[str]:
    """Return one line for each reward model whose texts may be too long.

    Too long is more tokens than the model can read (the prompt would lose its beginning) or than it was trained on.

    Raises ConfigError for a reward model that cannot read a prompt even with the shortest response.
    """
    longest = sorted(prompts, key=lambda prompt: -len(prompt.tokens))[:COUNTED]
    lines = (
        line
        for scorer in scorers
        if isinstance(scorer, RewardModelScorer)
        for line in _lines(scorer, longest, max_response_tokens)
    )
    return list(lines)


def _lines(scorer: RewardModelScorer, prompts: Sequence[Prompt], max_response_tokens: int) -> Iterator[str]:
    """At most one line for a scorer: the members of an ensemble are alike."""
    for member in scorer.members:
        line = _line(member, scorer.name, prompts, max_response_tokens)
        if line is not None:
            yield line
            return


def _line(model: RewardModel, name: str, prompts: Sequence[Prompt], max_response_tokens: int) -> str | None:
    shortest = max(model.num_tokens(prompt.content, SHORTEST) for prompt in prompts)
    longest = shortest - 1 + max_response_tokens
    limit = f"{model.limit} tokens ({model.limited_by})"
    if shortest > model.limit:
        raise ConfigError(
            f"reads at most {limit}, but the longest prompt has {shortest - 1} in its tokenizer and template",
            where=f"scorer {name}",
            fix="lower prompts.max_tokens or leave such prompts out (prompts.too_long: drop), or use another model",
        )
    if longest > model.limit:
        return (
            f"scorer {name} reads at most {limit}; the longest prompt and response may have {longest}, and the prompt "
            f"would then lose its beginning; cut/{name} counts such texts"
        )
    if model.max_tokens is not None and longest > model.max_tokens:
        return (
            f"scorer {name} was trained on texts of at most {model.max_tokens} tokens; the longest prompt and response "
            f"may have {longest}, and scores of longer texts are extrapolated"
        )
    return None
