"""Where the policy samples: the interface of an engine, and keel's sampler as an engine in the trainer's process."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from keel.data.batches import Rollouts
from keel.data.prompts import Prompt
from keel.rollout.sampler import sample_rollouts
from keel.world import generator


@dataclass(frozen=True)
class Draws:
    """The random numbers of some responses of a batch. They depend on the key and on the rows alone."""

    key: tuple[int | str, ...]  # such as (seed, "sample", step)
    count: int  # responses of the full batch, over all processes
    rows: Sequence[int]  # of the batch, in the order of the prompts

    def uniforms(self, tokens: int) -> Tensor:
        """Return numbers in [0, 1). [rows, tokens]"""
        numbers = torch.rand((self.count, tokens), generator=generator(*self.key), dtype=torch.float64)
        return numbers[torch.as_tensor(self.rows, dtype=torch.long)]

    def seeds(self) -> list[int]:
        """Return a seed for each row, for engines that draw their random numbers themselves."""
        digests = [hashlib.sha256(repr((*self.key, row)).encode()).digest() for row in self.rows]
        return [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]


class Engine(Protocol):
    """What samples the responses of a run."""

    @property
    def is_external(self) -> bool:
        """Whether another program samples. Its log-probs then never replace the trainer's."""

    def sample(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        draws: Draws,
        end_ids: Sequence[int],
        max_tokens: int | None = None,
        value_head: nn.Module | None = None,
    ) -> Rollouts:
        """Sample one response to each prompt from the current weights of the model.

        Args:
            end_ids: tokens that end a response.
            max_tokens: longest response, where it is below that of the run.
            value_head: on the trunk of the model; its outputs are returned too, if the engine can compute them.
        """

    def close(self) -> None:
        """Release what the engine holds. It can be called twice."""


@dataclass(frozen=True)
class OwnSampler:
    """keel's sampler."""

    tokenizer: PreTrainedTokenizerBase
    max_response_tokens: int
    temperature: float
    stop_in_text: bool = True
    stop_texts: tuple[str, ...] = ()
    is_external: bool = False

    def sample(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        draws: Draws,
        end_ids: Sequence[int],
        max_tokens: int | None = None,
        value_head: nn.Module | None = None,
    ) -> Rollouts:
        return sample_rollouts(
            model,
            list(prompts),
            self.tokenizer,
            draws.uniforms(self.max_response_tokens)[:, :max_tokens],
            end_ids,
            self.temperature,
            stop_in_text=self.stop_in_text,
            stop_texts=self.stop_texts,
            value_head=value_head,
        )

    def close(self) -> None:
        """Do nothing: the sampler holds nothing."""
