"""The mathematics of learning from human feedback, as pure functions of tensors.

Shape letters: B responses in a batch, P prompt tokens, T response tokens, V vocabulary, G group size.
Masks are boolean; True marks a token that the policy sampled and that counts.
Functions of tokens return [B, T], and the caller reduces.
"""

from keel.core import (
    advantages,
    best_of,
    diagnostics,
    kl,
    logprobs,
    losses,
    masked,
    pass_at_k,
    preferences,
    rewards,
    win_rate,
)

__all__ = [
    "advantages",
    "best_of",
    "diagnostics",
    "kl",
    "logprobs",
    "losses",
    "masked",
    "pass_at_k",
    "preferences",
    "rewards",
    "win_rate",
]
