"""T3 as tensors, and policies that are tables of logits: one row for each state, or one for each word before."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from keel.core.kl import kl_estimate
from keel.core.logprobs import token_logprobs
from keel.core.masked import masked_sum

from .t3 import ANSWERS, LENGTH, REFERENCE, STATES, State, score

Key = TypeVar("Key")

KL_COEF = 0.5
GARBAGE = 1  # the token in masked places: a word like any other, known as padding by the mask alone

TOKENS = torch.tensor([[*answer, *[GARBAGE] * (LENGTH - len(answer))] for answer in ANSWERS])  # [15, 3]
MASK = torch.tensor([[t < len(answer) for t in range(LENGTH)] for answer in ANSWERS])  # [15, 3]
SCORES = torch.tensor([score(answer) for answer in ANSWERS], dtype=torch.float64)  # [15]


def _rows(keys: list[Key], key_of: Callable[[State], Key]) -> Tensor:
    """Which row of a table decides each token of each answer; 0 in masked places. [15, 3]"""
    return torch.tensor([[keys.index(key_of(y[:t])) if t < len(y) else 0 for t in range(LENGTH)] for y in ANSWERS])


BY_STATE = _rows(STATES, lambda state: state)
BY_WORD = _rows(list(REFERENCE), lambda state: state[-1] if state else None)


def reference_by_word() -> Tensor:
    """The reference's logits, a row for each word before. [3, 3]"""
    return torch.tensor(list(REFERENCE.values()), dtype=torch.float64)


def reference_by_state() -> Tensor:
    """The same policy with a row for each state. [7, 3]"""
    return torch.tensor([REFERENCE[state[-1] if state else None] for state in STATES], dtype=torch.float64)


def logprobs(table: Tensor, rows: Tensor = BY_STATE) -> Tensor:
    """Log-probs of every answer's tokens under the policy with these logits. [R, 3] -> [15, 3]"""
    return token_logprobs(table[rows], TOKENS)


def answer_logprobs(table: Tensor, rows: Tensor = BY_STATE) -> Tensor:
    """log pi(answer). [R, 3] -> [15]"""
    return masked_sum(logprobs(table, rows), MASK, dim=1)


def divergence(table: Tensor, rows: Tensor = BY_STATE) -> Tensor:
    """KL(pi || pi_ref) of answers."""
    k1 = kl_estimate(logprobs(table, rows), logprobs(reference_by_state()))
    return (answer_logprobs(table, rows).exp() * masked_sum(k1, MASK, dim=1)).sum()


def mean_score(table: Tensor, rows: Tensor = BY_STATE) -> Tensor:
    """E[r]"""
    return (answer_logprobs(table, rows).exp() * SCORES).sum()


def objective(table: Tensor, kl_coef: float = KL_COEF) -> Tensor:
    """J = E[r] - kl_coef KL(pi || pi_ref)"""
    return mean_score(table) - kl_coef * divergence(table)


def optimal_answer_logprobs(kl_coef: float = KL_COEF) -> Tensor:
    """log pi*, from pi_ref exp(r / kl_coef), normalised. [15]"""
    return (answer_logprobs(reference_by_state()) + SCORES / kl_coef).log_softmax(0)


def total_variation(table: Tensor) -> float:
    """Half the sum of |pi - pi*| over the answers."""
    return 0.5 * (answer_logprobs(table).exp() - optimal_answer_logprobs().exp()).abs().sum().item()
