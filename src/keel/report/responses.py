"""The responses in a report: distributions over the steps, early and late examples, and a token view of a few."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keel.run.read.compare import word_differences
from keel.run.read.curves import round_value
from keel.run.read.responses import ResponseLog, as_text

MAX_BANDS = 40
MIN_PER_BAND = 8
"""Responses per band; quantiles of fewer are not informative."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SPREAD = {"score": "Score of a response", "length": "Tokens of a response", "kl": "KL of a response, in nats"}
BY_TOKEN = ("pieces", "tokens", "logprobs", "ref_logprobs", "values", "rewards", "advantages", "ratio")
END_SHARES = (0.1, 0.25, 0.5)
"""Shares of the run that count as early and as late. The first with enough common prompts is used."""
MAX_EXAMPLES = 3
MAX_SEARCHED = 200


def distributions(responses: ResponseLog) -> dict[str, dict[str, Any]]:
    """Return metric -> {"steps", "quantiles"} for each metric of SPREAD that varies over the responses."""
    columns = {metric: getattr(responses, metric) for metric in SPREAD}
    return {metric: bands(responses.step, values) for metric, values in columns.items() if _varies(values)}


def bands(step: Any, values: Any) -> dict[str, Any]:
    """Compute quantiles over consecutive ranges of steps.

    There are at most MAX_BANDS ranges, with at least MIN_PER_BAND responses each if the run has that many.

    Returns:
        {"steps": [ranges], "quantiles": [QUANTILES][ranges]}
    """
    finite = np.isfinite(values)
    step, values = step[finite], values[finite]
    steps = np.unique(step)
    count = max(1, min(MAX_BANDS, len(steps), len(step) // MIN_PER_BAND))
    ranges = [each for each in np.array_split(steps, count) if len(each)]
    members = [values[(step >= each[0]) & (step <= each[-1])] for each in ranges]
    table = np.array([np.quantile(each, QUANTILES) for each in members]).reshape(-1, len(QUANTILES))
    return {
        "steps": [round_value(float(each.mean())) for each in ranges],
        "quantiles": [[round_value(value) for value in column] for column in table.T],
    }


def early_and_late_responses(responses: ResponseLog) -> dict[str, Any]:
    """Return pairs of an early and a late response with their word differences.

    They are to prompts that occur at both ends of the run: the one with the largest gain in score, the median one, and
    the one with the largest loss. If no prompt occurs at both ends, the pairs are of the most similar prompts.

    Returns:
        {"same": whether the prompts are the same, "pairs": [...]}
    """
    for share in END_SHARES:
        pairs = _pairs_of_same_prompt(responses, share)
        if len(pairs) >= MAX_EXAMPLES:
            break
    if pairs:
        return {
            "same": True,
            "pairs": [_build_pair(responses, what, *pair) for what, pair in _largest_changes(responses, pairs)],
        }
    return {
        "same": False,
        "pairs": [_build_pair(responses, "", *pair) for pair in _pairs_of_similar_prompts(responses)],
    }


def compare_responses(runs: Sequence[ResponseLog]) -> list[dict[str, Any]]:
    """Return the last response of each run to prompts that all runs had in their second half.

    The prompts are those for which the scores differ most.

    Returns:
        [{"prompt", "answers": [one per run]}]
    """
    late = [_last_by_prompt(responses) for responses in runs]
    common = [prompt for prompt in late[0] if all(prompt in other for other in late[1:])] if late else []
    if len(runs) < 2 or not common:
        return []
    scores = np.array(
        [[responses.score[last[prompt]] for prompt in common] for responses, last in zip(runs, late, strict=True)]
    )
    difference = np.nan_to_num(np.ptp(scores, axis=0), nan=-1.0)
    chosen = [common[index] for index in np.argsort(-difference, kind="stable")[:MAX_EXAMPLES]]
    rows = [responses.rows([last[prompt] for prompt in chosen]) for responses, last in zip(runs, late, strict=True)]
    return [
        {"prompt": as_text(of_prompt[0].get("prompt", "")), "answers": [_shown_fields(row) for row in of_prompt]}
        for of_prompt in zip(*rows, strict=True)
    ]


def token_rows(responses: ResponseLog) -> list[dict[str, Any]]:
    """Return the responses with the best score, the worst score and the highest KL, and the last one.

    Returns:
        [{"what", "prompt", ..., "row"}], where `row` is for the token view.
    """
    reasons: dict[int, list[str]] = {}  # index of a response -> why it is shown
    for what, values, sign in (
        ("best", responses.score, 1),
        ("worst", responses.score, -1),
        ("highest KL", responses.kl, 1),
    ):
        if _varies(values):
            reasons.setdefault(int(np.nanargmax(sign * values)), []).append(what)
    if not len(responses):
        return []
    reasons.setdefault(len(responses) - 1, []).append("last")
    rows = responses.rows(list(reasons))
    return [
        _shown_fields(row)
        | {"what": " and ".join(what), "prompt": as_text(row.get("prompt", "")), "row": token_fields(row)}
        for what, row in zip(reasons.values(), rows, strict=True)
    ]


def token_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the token view reads."""
    return {name: row[name] for name in BY_TOKEN if name in row}


def _pairs_of_same_prompt(responses: ResponseLog, share: float) -> list[tuple[int, int]]:
    """Return (first, last) response to each prompt that occurs in the first and in the last `share` of the steps."""
    if not len(responses):
        return []
    first, last = int(responses.step.min()), int(responses.step.max())
    early, late = first + share * (last - first), last - share * (last - first)
    pairs = [(int(numbers[0]), int(numbers[-1])) for numbers in responses.by_prompt().values()]
    steps = [(int(responses.step[a]), int(responses.step[b])) for a, b in pairs]
    return [pair for pair, (a, b) in zip(pairs, steps, strict=True) if a < b and a <= early and b >= late]


def _largest_changes(responses: ResponseLog, pairs: list[tuple[int, int]]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the pairs with the largest gain, the median gain and the largest loss. Pairs without scores sort last."""
    change = np.array([responses.score[late] - responses.score[early] for early, late in pairs])
    order = [int(index) for index in np.argsort(-np.nan_to_num(change, nan=-np.inf), kind="stable")]
    # With one or two pairs, a later entry replaces an earlier one of the same pair.
    labels = {order[len(order) // 2]: "median change", order[-1]: "smallest gain, or loss", order[0]: "largest gain"}
    yield from ((labels[index], pairs[index]) for index in order if index in labels)


def _pairs_of_similar_prompts(responses: ResponseLog) -> list[tuple[int, int]]:
    """Return early and late responses to the prompts that share most words. Each response is in one pair at most."""
    count = min(MAX_SEARCHED, len(responses) // 2)
    if not count:
        return []
    ends = [np.arange(count), np.arange(len(responses) - count, len(responses))]
    words = [[(number, _word_set(prompt)) for number, prompt, _ in responses.texts(numbers)] for numbers in ends]
    candidates = sorted(
        (-len(early_words & late_words) / len(early_words | late_words), early, late)  # minus the Jaccard similarity
        for early, early_words in words[0]
        for late, late_words in words[1]
        if early_words & late_words
    )
    pairs: list[tuple[int, int]] = []
    for _, early, late in candidates:
        if len(pairs) < MAX_EXAMPLES and not any(early in pair or late in pair for pair in pairs):
            pairs.append((early, late))
    return pairs


def _word_set(prompt: Any) -> set[str]:
    return set(as_text(prompt).split())


def _build_pair(responses: ResponseLog, what: str, early: int, late: int) -> dict[str, Any]:
    early_row, late_row = responses.rows([early, late])
    prompts = [as_text(row.get("prompt", "")) for row in (early_row, late_row)]
    texts = [str(row.get("response", "")) for row in (early_row, late_row)]
    return {
        "what": what,
        "prompts": prompts if prompts[0] != prompts[1] else prompts[:1],
        "before": _shown_fields(early_row),
        "after": _shown_fields(late_row),
        "changes": word_differences(*texts),
    }


def _last_by_prompt(responses: ResponseLog) -> dict[int, int]:
    """Return prompt -> its last response, for prompts that occur in the second half of the steps."""
    if not len(responses):
        return {}
    middle = (int(responses.step.min()) + int(responses.step.max())) / 2
    last = {prompt: int(numbers[-1]) for prompt, numbers in responses.by_prompt().items()}
    return {prompt: number for prompt, number in last.items() if responses.step[number] >= middle}


def _shown_fields(row: dict[str, Any]) -> dict[str, Any]:
    names = ("step", "score", "kl", "length", "truncated", "scores")
    return {name: row.get(name) for name in names} | {"response": str(row.get("response", ""))}


def _varies(values: Any) -> bool:
    """Return whether values vary. False if nothing was measured, such as the KL of a run without a reference."""
    finite = np.asarray(values)[np.isfinite(values)]
    return bool(len(finite)) and bool(np.ptp(finite) > 0)
