"""The KL of a policy at temperature 1, where its responses are sampled from another distribution."""

from dataclasses import replace

import torch

from keel.config import DecodingSettings
from keel.evaluation.evaluated_policy import PASS_TOKENS, EvaluatedPolicy
from keel.evaluation.judged import EvaluatedResponses
from keel.learn.targets import analyze_all, reference_logprobs
from keel.models.actor_critic import ActorCritic
from keel.world import ALONE, World, raise_together


def is_tempered(decoding: DecodingSettings) -> bool:
    """Whether responses are sampled from another distribution than the model's softmax."""
    return decoding.temperature != 1.0 or decoding.top_k > 0 or decoding.top_p < 1.0


def add_untempered_kl(
    evaluated: EvaluatedResponses,
    policy: EvaluatedPolicy,
    reference: ActorCritic,
    decoding: DecodingSettings,
    seed: int,
    stream: str,
    world: World = ALONE,
) -> EvaluatedResponses:
    """Add `kl_untempered`, the KL(pi || pi_ref) at temperature 1 over the full vocabulary, if `kl` is not the same.

    It is the mean log-ratio of further responses, which are sampled for it from the model's softmax. The evaluated
    responses come from another distribution, and importance weights of full sequences vary too much to correct for it.

    Args:
        world: processes that call this together. Each samples for a share of the prompts.
    """
    if not is_tempered(decoding):
        return evaluated
    plain = decoding.model_copy(update={"temperature": 1.0, "top_k": 0, "top_p": 1.0})

    def measure_share() -> list[list[float]]:
        log_ratios = [torch.zeros(0, dtype=torch.float64)]  # the share may be empty
        for rollouts in policy.sample_responses(plain, seed, "evaluate", "untempered", stream, world=world):
            logprobs = analyze_all(policy.model, rollouts, 1.0, PASS_TOKENS).logprobs
            ref_logprobs = reference_logprobs(reference, rollouts, 1.0, PASS_TOKENS)
            log_ratios.append((logprobs - ref_logprobs).sum(1).double().cpu())
        rows: list[list[float]] = torch.cat(log_ratios).view(-1, decoding.num_responses).tolist()
        return rows

    shares = world.gather_values(raise_together(world, measure_share))
    values = torch.tensor([row for share in shares for row in share], dtype=torch.float64)
    return replace(evaluated, measured={**evaluated.measured, "kl_untempered": values})
