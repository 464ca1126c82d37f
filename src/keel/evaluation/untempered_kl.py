"""The KL of a policy at temperature 1, where its responses are sampled from another distribution."""

from dataclasses import replace

import torch

from keel.config import DecodingSettings
from keel.evaluation.judged import EvaluatedResponses
from keel.evaluation.sample import PASS_TOKENS, EvaluatedPolicy
from keel.learn.targets import analyze_all, reference_logprobs
from keel.models.actor_critic import ActorCritic


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
) -> EvaluatedResponses:
    """Add `kl_untempered`, the KL(pi || pi_ref) at temperature 1 over the full vocabulary, if `kl` is not the same.

    It is the mean log-ratio of further responses, which are sampled for it from the model's softmax. The evaluated
    responses come from another distribution, and importance weights of full sequences vary too much to correct for it.
    """
    if not is_tempered(decoding):
        return evaluated
    plain = decoding.model_copy(update={"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    log_ratios = []
    for rollouts in policy.sample_responses(plain, seed, "evaluate", "untempered", stream):
        logprobs = analyze_all(policy.model, rollouts, 1.0, PASS_TOKENS).logprobs
        log_ratios.append((logprobs - reference_logprobs(reference, rollouts, 1.0, PASS_TOKENS)).sum(1).double().cpu())
    values = torch.cat(log_ratios).view(-1, decoding.num_responses)
    return replace(evaluated, measured={**evaluated.measured, "kl_untempered": values})
