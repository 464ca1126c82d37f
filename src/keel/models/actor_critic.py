"""Policy and critic: the log-probability, entropy and value of every response token of a batch."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from keel.data.batches import Rollouts, TrainingBatch
from keel.models.heads import compute_values, token_statistics, unwrap_model
from keel.models.packed import token_states
from keel.models.sharding import forward_pass
from keel.world import run_concurrently


@dataclass(frozen=True)
class Analysis:
    """Statistics of the response tokens; 0 outside the mask."""

    logprobs: Tensor  # [B, T], at the sampling temperature
    entropy: Tensor  # [B, T]
    values: Tensor | None  # [B, T], V of the state before each token
    final_values: Tensor | None  # [B], V of the state after the last token


@dataclass(frozen=True)
class ValueUnits:
    """The scale of values: V = offset + gain * output of the value head.

    A head with weights of zero then starts at the mean return. Weights move by about the learning rate per step, so
    they would be slow to learn the offset and the scale of the reward.
    """

    offset: float = 0.0
    gain: float = 1.0
    deviation: float | None = None  # largest deviation of the returns of a batch so far

    @property
    def unit(self) -> float:
        """Unit of the value loss: the deviation of the returns, or 1 until it is known."""
        return 1.0 if self.deviation is None else self.deviation

    def values(self, outputs: Tensor) -> Tensor:
        """Convert outputs of the value head to values."""
        return self.offset + self.gain * outputs


class ActorCritic(nn.Module):
    """The policy and, for algorithms that need one, a critic: a separate classifier, or a value head on its trunk."""

    def __init__(self, policy: Any, critic: Any = None, value_head: Any = None) -> None:
        super().__init__()
        self.policy, self.critic, self.value_head = policy, critic, value_head
        self.value_units = ValueUnits()

    @property
    def has_critic(self) -> bool:
        return self.critic is not None or self.value_head is not None

    def models_read(self, with_values: bool, with_logprobs: bool) -> list[nn.Module]:
        """Return the models that `analyze` reads with."""
        if self.critic is not None:
            return [self.policy] * with_logprobs + [self.critic] * with_values
        return [self.policy] + [self.value_head] * (with_values and self.value_head is not None)

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
        """Read prompts and responses in one pass, or two with a separate critic.

        Args:
            entropy_gradient: whether the entropy has a gradient.
            with_logprobs: False takes the log-probs of the batch, which saves the policy's pass with a separate critic.
        """
        read = partial(self._read, batch, temperature, entropy_gradient)
        if self.critic is None or not (with_values and with_logprobs):
            return read(with_values, with_logprobs)
        by_policy, by_critic = run_concurrently(partial(read, False, True), partial(read, True, False))
        return replace(by_policy, values=by_critic.values, final_values=by_critic.final_values)

    def sampled_analysis(self, rollouts: Rollouts) -> Analysis | None:
        """Return the analysis that the sampler's own log-probs and values give, or None if it lacks values."""
        analysis = Analysis(rollouts.logprobs, torch.zeros_like(rollouts.logprobs), None, None)
        if not self.has_critic:
            return analysis
        if rollouts.value_outputs is None or rollouts.final_outputs is None:
            return None
        values = self.value_units.values(rollouts.value_outputs).masked_fill(~rollouts.response_mask, 0.0)
        return replace(analysis, values=values, final_values=self.value_units.values(rollouts.final_outputs))

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
        previous = is_response.nonzero().squeeze(1) - 1  # the states from which the response tokens were sampled
        analysis, states = Analysis(batch.logprobs, torch.zeros_like(batch.logprobs), None, None), None
        if with_logprobs:
            chosen = batch.response_tokens[batch.response_mask]

            def read() -> tuple[Tensor, tuple[Tensor, Tensor]]:
                states = token_states(self.policy, tokens, mask)
                return states, token_statistics(self.policy, states[previous], chosen, temperature, entropy_gradient)

            states, statistics = forward_pass(self.policy, read)
            logprobs, entropies = (_to_rows(statistic, batch) for statistic in statistics)
            analysis = replace(analysis, logprobs=logprobs, entropy=entropies)
        if not (with_values and self.has_critic):
            return analysis
        if self.critic is not None:
            critic: Any = unwrap_model(self.critic)
            values = forward_pass(critic, lambda: compute_values(critic.score, token_states(critic, tokens, mask)))
        else:
            if states is None:
                states = forward_pass(self.policy, lambda: token_states(self.policy, tokens, mask))
            values = compute_values(self.value_head, states)
        values = self.value_units.values(values)
        ends = mask.sum(1).cumsum(0) - 1  # the state after the last token of each packed row
        return replace(analysis, values=_to_rows(values[previous], batch), final_values=values[ends])


def _to_rows(flat: Tensor, batch: Rollouts | TrainingBatch) -> Tensor:
    """Put one number per response token into [B, T], with 0 outside the mask. [N] -> [B, T]"""
    blank = torch.zeros(batch.response_mask.shape, dtype=flat.dtype, device=flat.device)
    return blank.masked_scatter(batch.response_mask, flat)


def without_adapter(model: Any) -> AbstractContextManager[Any]:
    """Turn the adapter off inside. With LoRA this is the initial model; without LoRA nothing changes."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
