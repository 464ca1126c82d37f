"""Policy and critic over a batch: the log-probability, entropy and value of every response token, in one place."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keel.core.logprobs import entropy, token_logprobs
from keel.data.batches import Rollouts, TrainingBatch
from keel.models.heads import next_token_logits, positions_for, trunk, values_of

LOGITS_AT_ONCE = 2**25
"""Most logits that are held at once; longer batches go through the output matrix in chunks."""


@dataclass(frozen=True)
class Analysis:
    """What the models say of the response tokens; places outside the mask hold 0."""

    logprobs: Tensor  # [B, T], at the sampling temperature
    entropy: Tensor  # [B, T]
    values: Tensor | None  # [B, T], V of the state before each token
    final_values: Tensor | None  # [B], V of the state after the last token


class ActorCritic(nn.Module):
    """The policy and, for algorithms that need one, its critic: a classifier of its own, or a head on its trunk."""

    def __init__(self, policy: Any, critic: Any = None, value_head: Any = None) -> None:
        super().__init__()
        self.policy, self.critic, self.value_head = policy, critic, value_head

    @property
    def has_critic(self) -> bool:
        return self.critic is not None or self.value_head is not None

    def policy_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Parameters of the critic that are not the policy's."""
        module = self.critic if self.critic is not None else self.value_head
        return [] if module is None else [p for p in module.parameters() if p.requires_grad]

    def analyze(
        self,
        batch: Rollouts | TrainingBatch,
        temperature: float,
        with_entropy: bool = False,
        with_values: bool = True,
    ) -> Analysis:
        """One pass over prompts and responses (two when the critic has a trunk of its own)."""
        states = response_states(self.policy, batch)
        logprobs, entropies = token_statistics(self.policy, states, batch, temperature, with_entropy)
        if not (with_values and self.has_critic):
            return Analysis(logprobs, entropies, None, None)
        if self.critic is not None:
            values = values_of(self.critic.score, response_states(self.critic, batch))
        else:
            values = values_of(self.value_head, states)
        lengths = batch.response_mask.sum(1, keepdim=True)
        final = values.gather(1, lengths).squeeze(1)
        return Analysis(logprobs, entropies, values[:, :-1].masked_fill(~batch.response_mask, 0.0), final)


def response_states(model: Any, batch: Rollouts | TrainingBatch) -> Tensor:
    """Hidden states before each response token and after the last. -> [B, T + 1, H]

    Positions count real tokens only, so left padding changes nothing for any kind of position embedding.
    """
    tokens = torch.cat([batch.prompt_tokens, batch.response_tokens], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.response_mask], dim=1)
    output = trunk(model)(input_ids=tokens, attention_mask=mask.long(), use_cache=False, **positions_for(model, mask))
    return output.last_hidden_state[:, batch.prompt_tokens.shape[1] - 1 :]


def token_statistics(
    model: Any, states: Tensor, batch: Rollouts | TrainingBatch, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the counted tokens from their hidden states. -> [B, T], [B, T]

    Only counted positions meet the output matrix, a chunk at a time: [B, T, V] never exists.
    """
    mask = batch.response_mask
    chosen, tokens = states[:, :-1][mask], batch.response_tokens[mask]

    def statistics(hidden: Tensor, ids: Tensor) -> Tensor:
        logits = next_token_logits(model, hidden)
        logprobs = token_logprobs(logits, ids, temperature)
        return torch.stack([logprobs, entropy(logits, temperature) if with_entropy else torch.zeros_like(logprobs)])

    vocabulary = model.config.get_text_config().vocab_size
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    parts = [
        statistics(hidden, ids) if len(chosen) <= rows else checkpoint(statistics, hidden, ids, use_reentrant=False)
        for hidden, ids in zip(chosen.split(rows), tokens.split(rows), strict=True)
    ]
    logprobs, spreads = torch.cat(parts, dim=1)
    blank = torch.zeros(mask.shape, dtype=logprobs.dtype, device=logprobs.device)
    return blank.masked_scatter(mask, logprobs), blank.masked_scatter(mask, spreads)


def without_adapter(model: Any) -> AbstractContextManager[Any]:
    """With LoRA, the model as it was before training: the same base without the adapter."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
