"""Settings of how a policy samples its responses during training."""

from typing import Annotated

from pydantic import Field

from keel.config.sections import Count, Positive, Settings


class RolloutSettings(Settings):
    batch_size: Count = 64
    """Responses in each step, of all processes together"""
    group_size: Count | None = None
    """Responses to each prompt (default: 4 for rloo and grpo, else 1)"""
    max_response_tokens: Count = 64
    """Longest response, in tokens"""
    temperature: Positive = 1.0
    """Temperature of sampling and of all log-probabilities"""
    correction_cap: Annotated[float, Field(ge=1.0)] | None = 2.0
    """Largest weight of a token whose policy loss is corrected for differences of the sampler's log-probability from
    the trainer's; null: no correction"""
    stop: list[str] = []
    """Texts that end a response, in addition to the end tokens of the model"""
    stop_in_text: bool = True
    """Include an end token that is ordinary text, such as a full stop, in the text that scorers and logs see"""
