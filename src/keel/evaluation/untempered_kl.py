"""The KL of a policy as trained, beside that of the distribution that it was sampled from."""

from dataclasses import replace

import torch

from keel.config import DecodingSettings
from keel.evaluation.judged import EvaluatedResponses
from keel.evaluation.sample import PASS_TOKENS, EvaluatedPolicy
from keel.learn.targets import analyze_all, reference_logprobs
from keel.models.actor_critic import ActorCritic


def is_tempered(decoding: DecodingSettings) -> bool:
    """Whether responses come from another distribution than the model's softmax."""
    return decoding.temperature != 1.0 or decoding.top_k > 0 or decoding.top_p < 1.0


def add_untempered_kl(
    evaluated: EvaluatedResponses,
    policy: EvaluatedPolicy,
    reference: ActorCritic,
    decoding: DecodingSettings,
    seed: int,
    stream: str,
) -> EvaluatedResponses:
    """Add `kl_untempered`: KL(pi || pi_ref) at temperature 1 over the full vocabulary, where `kl` is another quantity.

    It is the mean log-ratio of responses sampled for this purpose from the model's softmax. The responses that are
    evaluated come from a sharper distribution; importance weights of full sequences would have no usable variance.
    """
    if not is_tempered(decoding):
        return evaluated
    plain = decoding.model_copy(update={"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    parts = []
    for rollouts in policy.sample_responses(plain, seed, "evaluate", "untempered", stream):
        own = analyze_all(policy.model, rollouts, 1.0, PASS_TOKENS).logprobs
        parts.append((own - reference_logprobs(reference, rollouts, 1.0, PASS_TOKENS)).sum(1).double().cpu())
    values = torch.cat(parts).view(-1, decoding.num_responses)
    return replace(evaluated, measured={**evaluated.measured, "kl_untempered": values})
