"""A policy with everything that the sampling of its responses needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from keel.config import DecodingSettings
from keel.data.batches import Rollouts
from keel.data.prompts import Prompt
from keel.models.actor_critic import ActorCritic
from keel.rollout.sampler import sample_rollouts
from keel.world import ALONE, World, generator

CHECKED_TOKENS = 32
"""Largest number of tokens of a response on which sampler and full forward pass are compared."""
PASS_TOKENS = 16_384
"""Tokens of one forward pass, padding included; no metric depends on it."""


class BatchSampler(Protocol):
    """Another program that samples the responses of a policy."""

    def sample_batches(
        self,
        policy: "EvaluatedPolicy",
        prompts: list[Prompt],
        decoding: DecodingSettings,
        stream: tuple[int | str, ...],
    ) -> Iterator[Rollouts]:
        """Yield batches of one response to each prompt, which depend on the stream and the row alone."""


@dataclass(frozen=True)
class EvaluatedPolicy:
    """A model with its tokenizer, end tokens and prompts."""

    name: str
    model: ActorCritic
    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]
    prompts: list[Prompt]
    stop_texts: tuple[str, ...] = ()  # texts of several tokens that end a response as the end tokens do
    engine: BatchSampler | None = None  # samples in place of keel's sampler

    def sample_responses(
        self, decoding: DecodingSettings, *stream: int | str, world: World = ALONE
    ) -> Iterator[Rollouts]:
        """Yield batches of responses, those to one prompt adjacent.

        The random numbers of a response depend neither on the batch size nor on the number of processes, so neither
        does the response.

        Args:
            world: processes that share the prompts; this one samples for its share.
        """
        share, k = world.share(len(self.prompts)), decoding.num_responses
        prompts = [prompt for prompt in self.prompts[share] for _ in range(k)]
        if self.engine is not None:
            yield from self.engine.sample_batches(self, prompts, decoding, stream)
            return
        numbers, tokens = generator(*stream), decoding.max_response_tokens
        for _ in range(share.start * k):
            torch.rand(tokens, generator=numbers, dtype=torch.float64)  # those of the processes before this one
        for start in range(0, len(prompts), decoding.batch_size):
            batch = prompts[start : start + decoding.batch_size]
            yield sample_rollouts(
                self.model.policy,
                batch,
                self.tokenizer,
                torch.rand(len(batch), tokens, generator=numbers, dtype=torch.float64),
                self.end_ids,
                decoding.temperature,
                decoding.top_k,
                decoding.top_p,
                decoding.stop_in_text,
                self.stop_texts,
            )
