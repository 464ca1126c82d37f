"""Check, before anything is sampled, that reward models can read the texts that they will score."""

from collections.abc import Iterator, Sequence

from keel.data.prompts import Prompt
from keel.errors import ConfigError
from keel.models.reward_model import RewardModel
from keel.rollout.scorers import RewardModelScorer, Scorer

COUNTED = 256
"""Number of longest prompts that are tokenized again for each reward model."""
SHORTEST = "."  # a response of one token


def length_warnings(scorers: Sequence[Scorer], prompts: Sequence[Prompt], max_response_tokens: int) -> list[str]:
    """Return one warning for each reward model whose texts may be too long.

    A text is too long if it has more tokens than the model can read (the prompt would lose its beginning) or than it
    was trained on. Raises ConfigError for a reward model that cannot read a prompt even with the shortest response.
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
    """Return at most one warning per scorer, since the members of an ensemble are alike."""
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
            f"the model reads at most {limit}, but the longest prompt has {shortest - 1} in its tokenizer and template",
            where=f"scorer {name}",
            fix="lower prompts.max_tokens, drop such prompts (prompts.too_long: drop), or use another model",
        )
    if longest > model.limit:
        return (
            f"scorer {name} reads at most {limit}, but the longest prompt and response may have {longest}. The prompt "
            f"then loses its beginning. cut/{name} counts such texts"
        )
    if model.max_tokens is not None and longest > model.max_tokens:
        return (
            f"scorer {name} was trained on texts of at most {model.max_tokens} tokens, but the longest prompt and "
            f"response may have {longest}. Scores of longer texts are extrapolated"
        )
    return None
