"""Policy and critic over a batch: the log-probability, entropy and value of every response token, in one place."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from keel.data.batches import Rollouts, TrainingBatch
from keel.models.heads import compute_values, plain, token_statistics
from keel.models.packed import token_states
from keel.world import at_once


@dataclass(frozen=True)
class Analysis:
    """What the models say of the response tokens; places outside the mask hold 0."""

    logprobs: Tensor  # [B, T], at the sampling temperature
    entropy: Tensor  # [B, T]
    values: Tensor | None  # [B, T], V of the state before each token
    final_values: Tensor | None  # [B], V of the state after the last token


@dataclass(frozen=True)
class ValueUnits:
    """How the output of a value head becomes a value: V = offset + gain * output.

    A head that starts at zero then starts at the mean return, and neither the reward's offset nor its scale has to be
    learned by weights that move a learning rate a step.
    """

    offset: float = 0.0
    gain: float = 1.0
    deviation: float | None = None  # largest of the returns of a batch: the unit of the value loss

    @property
    def unit(self) -> float:
        """Deviation of the returns, 1 until it is known."""
        return 1.0 if self.deviation is None else self.deviation

    def values(self, outputs: Tensor) -> Tensor:
        """Values of a head's outputs."""
        return self.offset + self.gain * outputs


class ActorCritic(nn.Module):
    """The policy and, for algorithms that need one, its critic: a classifier of its own, or a head on its trunk."""

    def __init__(self, policy: Any, critic: Any = None, value_head: Any = None) -> None:
        super().__init__()
        self.policy, self.critic, self.value_head = policy, critic, value_head
        self.value_units = ValueUnits()

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
        entropy_gradient: bool = False,
        with_values: bool = True,
        with_logprobs: bool = True,
    ) -> Analysis:
        """One pass over prompts and responses (two when the critic has a trunk of its own).

        Without log-probs those of the batch stand for them, which spares a separate critic the policy's pass.
        """
        read = partial(self._read, batch, temperature, entropy_gradient)
        if self.critic is None or not (with_values and with_logprobs):
            return read(with_values, with_logprobs)
        spoken, valued = at_once(partial(read, False, True), partial(read, True, False))
        return replace(spoken, values=valued.values, final_values=valued.final_values)

    def _read(
        self,
        batch: Rollouts | TrainingBatch,
        temperature: float,
        entropy_gradient: bool,
        with_values: bool,
        with_logprobs: bool,
    ) -> Analysis:
        tokens = torch.cat([batch.prompt_tokens, batch.response_tokens], dim=1)
        mask = torch.cat([batch.prompt_mask, batch.response_mask], dim=1)
        is_response = torch.cat([torch.zeros_like(batch.prompt_mask), batch.response_mask], dim=1)[mask]
        before = is_response.nonzero().squeeze(1) - 1  # the states that the response tokens were chosen in
        found, states = Analysis(batch.logprobs, torch.zeros_like(batch.logprobs), None, None), None
        if with_logprobs:
            states = token_states(self.policy, tokens, mask)
            chosen = batch.response_tokens[batch.response_mask]
            metrics = token_statistics(self.policy, states[before], chosen, temperature, entropy_gradient)
            logprobs, entropies = (_rows(metric, batch) for metric in metrics)
            found = replace(found, logprobs=logprobs, entropy=entropies)
        if not (with_values and self.has_critic):
            return found
        if self.critic is not None:
            critic: Any = plain(self.critic)
            values = compute_values(critic.score, token_states(critic, tokens, mask))
        else:
            values = compute_values(
                self.value_head, token_states(self.policy, tokens, mask) if states is None else states
            )
        values = self.value_units.values(values)
        ends = mask.sum(1).cumsum(0) - 1
        return replace(found, values=_rows(values[before], batch), final_values=values[ends])


def _rows(flat: Tensor, batch: Rollouts | TrainingBatch) -> Tensor:
    """Figures of the response tokens, one after the other, as [B, T] with 0 outside the mask."""
    blank = torch.zeros(batch.response_mask.shape, dtype=flat.dtype, device=flat.device)
    return blank.masked_scatter(batch.response_mask, flat)


def without_adapter(model: Any) -> AbstractContextManager[Any]:
    """With LoRA, the model as it was before training: the same base without the adapter."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
