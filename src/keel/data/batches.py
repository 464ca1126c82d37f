"""Batches of a policy-learning step, one class for each stage: sampled, scored, ready for the update.

B responses in a batch, P prompt tokens, T response tokens. Prompts are padded left, responses right. Only the masks
identify padding, because the pad token may also be a real token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from keel.data.prompts import Prompt


@dataclass(frozen=True)
class Rollouts:
    """Prompts and the responses that the policy sampled."""

    prompts: list[Prompt]  # B; rows of one group are adjacent and share their prompt
    prompt_tokens: Tensor  # [B, P]
    prompt_mask: Tensor  # [B, P] bool
    response_tokens: Tensor  # [B, T]
    response_mask: Tensor  # [B, T] bool, True = sampled by the policy, the end token included
    logprobs: Tensor  # [B, T], of the sampled tokens under the policy that sampled
    truncated: Tensor  # [B] bool, True = stopped by the length limit
    texts: list[str]  # B; the responses as text, without special tokens
    # Outputs of a value head on the policy's trunk, where the sampler computes them: [B, T] before each token, and [B]
    # after the last token of truncated responses, else 0
    value_outputs: Tensor | None = None
    final_outputs: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Number of response tokens of each row. [B]"""
        return self.response_mask.sum(1)


def no_rollouts(device: torch.device) -> Rollouts:
    """Return a batch of no responses, for a process whose share of a batch is empty."""
    tokens, mask = (
        torch.zeros((0, 1), dtype=torch.long, device=device),
        torch.zeros((0, 1), dtype=torch.bool, device=device),
    )
    return Rollouts([], tokens, mask, tokens, mask, mask.float(), mask[:, 0], [])


@dataclass(frozen=True)
class Resampling:
    """What it took to replace the groups of equal scores of a batch, see `rollout.resample_rounds`."""

    rounds: int = 0
    num_groups: int = 0  # groups that were sampled in place of others, on all processes
    num_tokens: int = 0  # tokens of the responses that were replaced, on this process


@dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts with the scores of all scorers."""

    rollouts: Rollouts
    scores: Tensor  # [B], weighted sum over scorers, before shaping
    segment_scores: Tensor | None  # [B, T], the same sum on the last token of each segment; None without segments
    by_scorer: dict[str, Tensor]  # scorer -> [B], NaN where the scorer does not apply
    kept: Tensor  # [B] bool, False where scoring failed and the response is dropped
    disagreement: dict[str, Tensor] = field(default_factory=dict)  # ensemble -> [B], standard deviation of its members
    cut: dict[str, Tensor] = field(
        default_factory=dict
    )  # reward model -> [B] bool, the text was too long to read fully
    failures: dict[str, str] = field(default_factory=dict)  # scorer -> description of its first failure
    logged: dict[str, list[float]] = field(default_factory=dict)  # values of log_metric
    columns: dict[str, list[Any]] = field(default_factory=dict)  # name -> [B], values of log_extra
    resampling: Resampling | None = None  # None: groups of equal scores have not been looked for


@dataclass(frozen=True)
class TrainingBatch:
    """Inputs of the update, per token."""

    prompt_tokens: Tensor  # [B, P]
    prompt_mask: Tensor  # [B, P] bool
    response_tokens: Tensor  # [B, T]
    response_mask: Tensor  # [B, T] bool
    logprobs: Tensor  # [B, T], of the policy that sampled
    weights: Tensor  # [B, T], of the policy loss: corrections where the sampler's log-probs differ, else 1
    ref_logprobs: Tensor  # [B, T]; equal to logprobs when there is no reference
    values: Tensor  # [B, T]; zeros without a critic
    rewards: Tensor  # [B, T]
    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T]

    @property
    def size(self) -> int:
        return self.response_mask.shape[0]


BatchT = TypeVar("BatchT", bound=Rollouts | TrainingBatch)


def select_rows(batch: BatchT, rows: Sequence[int]) -> BatchT:
    """Return these rows in this order, trimmed to their longest prompt and response."""
    index = torch.as_tensor(rows, dtype=torch.long, device=batch.response_mask.device)
    prompt_width, response_width = (
        max([1, *mask[index].sum(1).tolist()]) for mask in (batch.prompt_mask, batch.response_mask)
    )
    selected: dict[str, Any] = {}
    for name in (each.name for each in fields(batch)):
        value = getattr(batch, name)
        if value is None:
            continue
        if isinstance(value, list):
            selected[name] = [value[row] for row in rows]
        elif name.startswith("prompt_"):
            selected[name] = value[index, -prompt_width:]
        else:
            selected[name] = value[index, :response_width] if value.dim() == 2 else value[index]
    return replace(batch, **selected)
