"""The mathematics of learning from human judgement: pure functions of tensors.

Shape letters: B responses in a batch, P prompt tokens, T response tokens, V vocabulary, G group size.
Masks are boolean, True = sampled by the policy, counts. Functions of tokens return [B, T]; the caller reduces.
"""

from keel.core import advantages, best_of, diagnostics, kl, logprobs, losses, masked, preferences, rewards, win_rate

__all__ = [
    "advantages",
    "best_of",
    "diagnostics",
    "kl",
    "logprobs",
    "losses",
    "masked",
    "preferences",
    "rewards",
    "win_rate",
]
