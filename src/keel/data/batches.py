"""What flows through a step of policy learning. Each stage has only the fields that exist by then.

B responses in a batch, P prompt tokens, T response tokens. Prompts are padded left, responses right; padding is
known by the masks alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from keel.data.prompts import Prompt


@dataclass(frozen=True)
class Rollouts:
    """Prompts and the policy's answers."""

    prompts: list[Prompt]  # B; rows of one group are adjacent and share their prompt
    prompt_tokens: Tensor  # [B, P]
    prompt_mask: Tensor  # [B, P] bool
    response_tokens: Tensor  # [B, T]
    response_mask: Tensor  # [B, T] bool, True = sampled by the policy, the end token included
    logprobs: Tensor  # [B, T], of each token as it was sampled
    truncated: Tensor  # [B] bool, stopped by the length limit
    texts: list[str]  # B; the responses as text, without special tokens

    @property
    def lengths(self) -> Tensor:
        """Response tokens of each row. [B]"""
        return self.response_mask.sum(1)


@dataclass(frozen=True)
class ScoredRollouts:
    """Answers and what the scorers said of them."""

    rollouts: Rollouts
    scores: Tensor  # [B], weighted sum over scorers, before any shaping
    segment_scores: Tensor | None  # [B, T], the same sum on the last token of each segment; None without segments
    by_scorer: dict[str, Tensor]  # name -> [B], NaN where the scorer had nothing to say
    kept: Tensor  # [B] bool, False where scoring failed and the response is dropped
    disagreement: dict[str, Tensor] = field(default_factory=dict)  # of each ensemble: name -> [B], its members' std
    cut: dict[str, Tensor] = field(
        default_factory=dict
    )  # of each reward model: name -> [B] bool, text too long to read
    failures: dict[str, str] = field(default_factory=dict)  # name -> what the first failure was
    logged: dict[str, list[float]] = field(default_factory=dict)  # metrics that reward functions logged
    columns: dict[str, list[Any]] = field(default_factory=dict)  # name -> [B], values that they logged


@dataclass(frozen=True)
class TrainingBatch:
    """Everything the update needs, per token."""

    prompt_tokens: Tensor  # [B, P]
    prompt_mask: Tensor  # [B, P] bool
    response_tokens: Tensor  # [B, T]
    response_mask: Tensor  # [B, T] bool
    logprobs: Tensor  # [B, T], of the policy that sampled
    ref_logprobs: Tensor  # [B, T]; equal to logprobs when there is no reference
    values: Tensor  # [B, T]; zeros without a critic
    rewards: Tensor  # [B, T]
    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T]

    @property
    def size(self) -> int:
        return self.response_mask.shape[0]


BatchT = TypeVar("BatchT", Rollouts, TrainingBatch)


def select_rows(batch: BatchT, rows: Sequence[int]) -> BatchT:
    """The given rows in the given order, trimmed to their longest prompt and response."""
    index = torch.as_tensor(rows, device=batch.response_mask.device)
    prompt_width = max(1, int(batch.prompt_mask[index].sum(1).max()))
    response_width = max(1, int(batch.response_mask[index].sum(1).max()))
    chosen: dict[str, Any] = {}
    for own in fields(batch):
        value = getattr(batch, own.name)
        if isinstance(value, list):
            chosen[own.name] = [value[row] for row in rows]
        elif own.name.startswith("prompt_"):
            chosen[own.name] = value[index, -prompt_width:]
        else:
            chosen[own.name] = value[index, :response_width] if value.dim() == 2 else value[index]
    return replace(batch, **chosen)
