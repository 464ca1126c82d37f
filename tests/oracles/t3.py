"""The toy world T3 and its exact numbers, with nothing but the standard library: `python tests/oracles/t3.py`.

Words a = 0, b = 1, end = 2; at most three tokens. The reference's logits depend on the word before only. The score is
the number of a's if the answer ends, else -1. So there are 15 answers (7 ended, 8 cut off) and 7 states to act in.
"""

import math
from collections.abc import Callable, Iterator

State = tuple[int, ...]
Table = dict[int | None, list[float]]

END, LENGTH = 2, 3
REFERENCE: Table = {None: [1.0, 0.0, -1.0], 0: [0.0, 0.5, 0.5], 1: [0.5, 0.0, 0.0]}

# What the functions below print, to ten digits. The tests compare keel with these literals.
REFERENCE_SCORE = 0.0888414063  # E_ref[r]
REFERENCE_VALUES = {
    (): 0.0888414063,
    (0,): 0.2454205512,
    (1,): -0.3041019113,
    (0, 0): 0.1509551936,
    (0, 1): -0.4518627619,
    (1, 0): -0.2326965376,
    (1, 1): -0.7259313809,
}
SOFT_VALUES = {  # kl_coef = .5
    (): 0.9113052878,
    (0,): 1.0725608464,
    (1,): 0.2637678742,
    (0, 0): 1.5229770977,
    (0, 1): 0.3764981109,
    (1, 0): 0.5354899759,
    (1, 1): -0.4940105286,
}
OPTIMUM = {  # kl_coef -> J*, E[r], KL(pi* || pi_ref)
    1.0: (0.5651905340, 0.9834390161, 0.4182484822),
    0.5: (0.9113052878, 1.4782560678, 1.1339015599),
    0.1: (1.7176634834, 1.9997190591, 2.8205557575),
}
PARTITION = 6.1879916021  # Z at kl_coef = .5
OPTIMAL_ANSWERS = {(0, 0, 2): 0.5240036045, (0, 2): 0.3047581926, (2,): 0.0145492397}
OPTIMAL_TRUNCATED = 0.0086942561
OPTIMAL_FIRST_TOKEN = [0.9184251702, 0.0670255900, 0.0145492397]
SCORE_GRADIENT = [  # dE[r]/d logits at the reference; rows: after nothing, a, b; columns: a, b, end
    [0.1041628601, -0.0961644173, -0.0079984427],
    [-0.0758266073, -0.2788686479, 0.3546952552],
    [-0.0636238852, -0.0716722789, 0.1352961640],
]


def answers(start: State = ()) -> Iterator[State]:
    """All answers that begin with `start`."""
    if len(start) == LENGTH or (start and start[-1] == END):
        yield start
        return
    for token in range(3):
        yield from answers((*start, token))


ANSWERS = list(answers())
STATES: list[State] = list(REFERENCE_VALUES)


def score(answer: State) -> float:
    return float(answer.count(0)) if answer[-1] == END else -1.0


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - total for z in logits]


def logprob(answer: State, start: int = 0, table: Table = REFERENCE) -> float:
    """log pi(the tokens from `start` on | those before)"""
    return sum(log_softmax(table[answer[i - 1] if i else None])[answer[i]] for i in range(start, len(answer)))


def expectation(state: State, f: Callable[[float], float], table: Table = REFERENCE) -> float:
    """E[f(score)] over what the table's policy may add to `state`."""
    return sum(math.exp(logprob(y, len(state), table)) * f(score(y)) for y in answers(state))


def soft_value(state: State, kl_coef: float) -> float:
    """kl_coef log E_ref[exp(score / kl_coef)]: the most that score - kl_coef KL can reach from here."""
    return kl_coef * math.log(expectation(state, lambda r: math.exp(r / kl_coef)))


def optimal(answer: State, kl_coef: float) -> float:
    """pi*(answer) = pi_ref exp(score / kl_coef) / Z"""
    return math.exp(logprob(answer) + (score(answer) - soft_value((), kl_coef)) / kl_coef)


def optimum(kl_coef: float) -> tuple[float, float, float]:
    """J*, E[r] and KL(pi* || pi_ref)."""
    mean_score = sum(optimal(y, kl_coef) * score(y) for y in ANSWERS)
    divergence = sum(optimal(y, kl_coef) * (math.log(optimal(y, kl_coef)) - logprob(y)) for y in ANSWERS)
    return soft_value((), kl_coef), mean_score, divergence


def score_gradient(step: float = 1e-5) -> list[list[float]]:
    """dE[r]/d logits by central differences."""

    def moved(row: int | None, column: int, by: float) -> float:
        table = {key: list(logits) for key, logits in REFERENCE.items()}
        table[row][column] += by
        return expectation((), float, table)

    return [[(moved(r, c, step) - moved(r, c, -step)) / (2 * step) for c in range(3)] for r in REFERENCE]


def main() -> None:
    print("E_ref[r]", expectation((), float))
    print("V_ref", {state: round(expectation(state, float), 10) for state in STATES})
    print("soft V", {state: round(soft_value(state, 0.5), 10) for state in STATES})
    for kl_coef in OPTIMUM:
        print("kl_coef", kl_coef, "J*, E[r], KL", [round(x, 10) for x in optimum(kl_coef)])
    print("Z", math.exp(soft_value((), 0.5) / 0.5))
    print("pi*", {y: round(optimal(y, 0.5), 10) for y in ANSWERS})
    print("gradient", [[round(g, 10) for g in row] for row in score_gradient()])


if __name__ == "__main__":
    main()
