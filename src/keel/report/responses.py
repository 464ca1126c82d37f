"""What a report shows of a run's answers: how they spread, what became of the same prompt, and a few token by token."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keel.run.read.compare import word_differences
from keel.run.read.curves import round_value
from keel.run.read.responses import ResponseLog, as_text

BANDS = 40
FEWEST = 8
"""Answers in a band, or its quantiles say nothing."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SPREAD = {"score": "Score of an answer", "length": "Tokens of an answer", "kl": "KL of an answer, in nats"}
BY_TOKEN = ("pieces", "tokens", "logprobs", "ref_logprobs", "values", "rewards", "advantages", "ratio")
PARTS = (0.1, 0.25, 0.5)
"""Shares of the run that count as early, and as late: the first that has enough prompts in common."""
SHOWN = 3
LOOKED_AT = 200


def distributions(responses: ResponseLog) -> dict[str, dict[str, Any]]:
    """Figure of SPREAD -> {"steps", "quantiles"}, of those that vary over the answers."""
    columns = {metric: getattr(responses, metric) for metric in SPREAD}
    return {metric: bands(responses.step, values) for metric, values in columns.items() if _varies(values)}


def bands(step: Any, values: Any) -> dict[str, Any]:
    """{"steps", "quantiles"} of at most BANDS stretches of steps, each of FEWEST answers and more if there are so many;
    [stretches] and [QUANTILES][stretches]."""
    known = np.isfinite(values)
    step, values = step[known], values[known]
    steps = np.unique(step)
    count = max(1, min(BANDS, len(steps), len(step) // FEWEST))
    parts = [own for own in np.array_split(steps, count) if len(own)]
    inside = [values[(step >= own[0]) & (step <= own[-1])] for own in parts]
    table = np.array([np.quantile(own, QUANTILES) for own in inside]).reshape(-1, len(QUANTILES))
    return {
        "steps": [round_value(float(own.mean())) for own in parts],
        "quantiles": [[round_value(value) for value in column] for column in table.T],
    }


def early_and_late_responses(responses: ResponseLog) -> dict[str, Any]:
    """{"same": whether the prompts are, "pairs": [...]}: answers early and late in a run, with what changed marked.

    Of the prompts that were asked at both ends: the one whose score gained most, one in the middle, and the one that
    lost most. Where there is none, the prompts most alike.
    """
    for part in PARTS:
        pairs = _asked_twice(responses, part)
        if len(pairs) >= SHOWN:
            break
    if pairs:
        return {
            "same": True,
            "pairs": [_pair(responses, what, *pair) for what, pair in _marked_difference(responses, pairs)],
        }
    return {"same": False, "pairs": [_pair(responses, "", *pair) for pair in _alike(responses)]}


def compare_responses(runs: Sequence[ResponseLog]) -> list[dict[str, Any]]:
    """[{"prompt", "answers": [one a run]}]: prompts that all runs were asked in their second half, where their scores
    are furthest apart; the last answer of each."""
    late = [_last_by_prompt(responses) for responses in runs]
    common = [prompt for prompt in late[0] if all(prompt in other for other in late[1:])] if late else []
    if len(runs) < 2 or not common:
        return []
    scores = np.array(
        [[responses.score[own[prompt]] for prompt in common] for responses, own in zip(runs, late, strict=True)]
    )
    apart = np.nan_to_num(np.ptp(scores, axis=0), nan=-1.0)
    chosen = [common[place] for place in np.argsort(-apart, kind="stable")[:SHOWN]]
    rows = [responses.rows([own[prompt] for prompt in chosen]) for responses, own in zip(runs, late, strict=True)]
    return [
        {"prompt": as_text(own[0].get("prompt", "")), "answers": [_shown(row) for row in own]}
        for own in zip(*rows, strict=True)
    ]


def token_rows(responses: ResponseLog) -> list[dict[str, Any]]:
    """The best, the worst, the one furthest from the reference and the last: [{"what", "prompt", ..., "row"}]."""
    wanted: dict[int, list[str]] = {}
    for what, values, sign in (
        ("best", responses.score, 1),
        ("worst", responses.score, -1),
        ("highest KL", responses.kl, 1),
    ):
        if _varies(values):
            wanted.setdefault(int(np.nanargmax(sign * values)), []).append(what)
    if not len(responses):
        return []
    wanted.setdefault(len(responses) - 1, []).append("last")
    rows = responses.rows(list(wanted))
    return [
        _shown(row) | {"what": " and ".join(what), "prompt": as_text(row.get("prompt", "")), "row": by_token(row)}
        for what, row in zip(wanted.values(), rows, strict=True)
    ]


def by_token(row: dict[str, Any]) -> dict[str, Any]:
    """What the token view reads."""
    return {name: row[name] for name in BY_TOKEN if name in row}


def _asked_twice(responses: ResponseLog, part: float) -> list[tuple[int, int]]:
    """(early, late): of each prompt asked in the first and in the last part of the steps, its first and last answer."""
    if not len(responses):
        return []
    first, last = int(responses.step.min()), int(responses.step.max())
    early, late = first + part * (last - first), last - part * (last - first)
    pairs = [(int(own[0]), int(own[-1])) for own in responses.by_prompt().values()]
    steps = [(int(responses.step[a]), int(responses.step[b])) for a, b in pairs]
    return [pair for pair, (a, b) in zip(pairs, steps, strict=True) if a < b and a <= early and b >= late]


def _marked_difference(responses: ResponseLog, pairs: list[tuple[int, int]]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The greatest gain, the middle one and the greatest loss; pairs without scores last."""
    change = np.array([responses.score[late] - responses.score[early] for early, late in pairs])
    order = [int(place) for place in np.argsort(-np.nan_to_num(change, nan=-np.inf), kind="stable")]
    named = {order[len(order) // 2]: "in the middle", order[-1]: "least gained, or lost", order[0]: "most gained"}
    yield from ((named[place], pairs[place]) for place in order if place in named)


def _alike(responses: ResponseLog) -> list[tuple[int, int]]:
    """Early and late answers to the prompts that share most words, each answer in one pair at most."""
    count = min(LOOKED_AT, len(responses) // 2)
    if not count:
        return []
    ends = [np.arange(count), np.arange(len(responses) - count, len(responses))]
    words = [[(number, _word_set(prompt)) for number, prompt, _ in responses.texts(numbers)] for numbers in ends]
    found = sorted(
        (-len(mine & theirs) / len(mine | theirs), early, late)
        for early, mine in words[0]
        for late, theirs in words[1]
        if mine & theirs
    )
    pairs: list[tuple[int, int]] = []
    for _, early, late in found:
        if len(pairs) < SHOWN and not any(early in pair or late in pair for pair in pairs):
            pairs.append((early, late))
    return pairs


def _word_set(prompt: Any) -> set[str]:
    return set(as_text(prompt).split())


def _pair(responses: ResponseLog, what: str, early: int, late: int) -> dict[str, Any]:
    before, after = responses.rows([early, late])
    prompts = [as_text(row.get("prompt", "")) for row in (before, after)]
    texts = [str(row.get("response", "")) for row in (before, after)]
    return {
        "what": what,
        "prompts": prompts if prompts[0] != prompts[1] else prompts[:1],
        "before": _shown(before),
        "after": _shown(after),
        "changes": word_differences(*texts),
    }


def _last_by_prompt(responses: ResponseLog) -> dict[int, int]:
    """Prompt -> its last answer, of those in the second half of the steps."""
    if not len(responses):
        return {}
    middle = (int(responses.step.min()) + int(responses.step.max())) / 2
    last = {prompt: int(numbers[-1]) for prompt, numbers in responses.by_prompt().items()}
    return {prompt: number for prompt, number in last.items() if responses.step[number] >= middle}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    names = ("step", "score", "kl", "length", "truncated", "scores")
    return {name: row.get(name) for name in names} | {"response": str(row.get("response", ""))}


def _varies(values: Any) -> bool:
    """False for what was not measured, such as the KL of a run without a reference."""
    known = np.asarray(values)[np.isfinite(values)]
    return bool(len(known)) and bool(np.ptp(known) > 0)
