"""Two runs side by side: the prompts that both answered, and what each made of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel.run.read.compare import word_differences
from keel.run.read.curves import round_value
from keel.run.read.responses import Numbers, ResponseLog, as_text
from keel.web.dashboard.disputes import Dispute
from keel.web.dashboard.response_list import prompt_snippet

SHOWN = 200  # answers of each run to one prompt that a page offers
WORDS = 20_000  # characters of two answers that are compared word by word


@dataclass(frozen=True)
class PromptSummaries:
    """The P prompts of a run in rising order of their key, and its answers to each."""

    prompts: Numbers  # [P]
    counts: Numbers  # [P]
    means: NDArray[np.float64]  # [P], of the scores; nan where none has one
    last: Numbers  # [P], number of the newest answer

    @classmethod
    def from_responses(cls, responses: ResponseLog) -> "PromptSummaries":
        index = responses.index
        order = np.argsort(index.prompt, kind="stable")
        prompts, first, counts = np.unique(index.prompt[order], return_index=True, return_counts=True)
        scores = index.score[order]
        finite = np.isfinite(scores)
        if not len(order):
            return cls(prompts, counts, np.array([]), order)
        sums = np.add.reduceat(np.where(finite, scores, 0.0), first)
        scored = np.add.reduceat(finite.astype(np.int64), first)
        means = np.divide(sums, scored, out=np.full(len(sums), np.nan), where=scored > 0)
        return cls(prompts, counts, means, order[first + counts - 1])

    def only(self, places: Numbers) -> "PromptSummaries":
        return PromptSummaries(self.prompts[places], self.counts[places], self.means[places], self.last[places])


def shared_prompts(here: ResponseLog, there: ResponseLog) -> tuple[PromptSummaries, PromptSummaries]:
    """Both sides of the prompts that both answered."""
    own, other = PromptSummaries.from_responses(here), PromptSummaries.from_responses(there)
    _, first, second = np.intersect1d(own.prompts, other.prompts, assume_unique=True, return_indices=True)
    return own.only(first), other.only(second)


def shared_page(here: ResponseLog, there: ResponseLog, text: str, by: str, offset: int, limit: int) -> dict[str, Any]:
    """Some of the prompts that both answered. `by`: what was asked last ("newest"), or gained or lost most."""
    own, other = shared_prompts(here, there)
    gain = other.means - own.means
    order = np.argsort({"better": -gain, "worse": gain}.get(by, -own.last), kind="stable")
    if text:
        holds = np.isin(own.last, here.with_text(np.sort(own.last), text))
        holds |= np.isin(other.last, there.with_text(np.sort(other.last), text))
        order = order[holds[order]]
    shown = order[offset : offset + limit]
    prompts = {number: as_text(prompt) for number, prompt, _ in here.texts(np.sort(own.last[shown]))}
    rows = [
        {
            "at": int(here.index.start[own.last[place]]),
            "there": int(there.index.start[other.last[place]]),
            "prompt": prompt_snippet(prompts[int(own.last[place])]),
            "counts": [int(own.counts[place]), int(other.counts[place])],
            "means": [round_value(own.means[place]), round_value(other.means[place])],
        }
        for place in shown.tolist()
    ]
    return {"total": len(own.prompts), "matched": len(order), "offset": offset, "rows": rows}


def pair(here: ResponseLog, there: ResponseLog, one: int, other: int) -> dict[str, Any]:
    """Two answers in full, what differs between them, and the other answers to the same prompt."""
    rows = [here.rows([one])[0], there.rows([other])[0]]
    texts = [str(row.get("response", "")) for row in rows]
    short = sum(map(len, texts)) <= WORDS
    return {
        "rows": rows,
        "prompts": [as_text(row.get("prompt", "")) for row in rows],
        "differences": word_differences(*texts) if short else [],
        "choices": [_choices(here, one), _choices(there, other)],
    }


def _choices(responses: ResponseLog, number: int) -> list[dict[str, Any]]:
    """The newest answers to the same prompt, newest first."""
    index = responses.index
    same = np.flatnonzero(index.prompt == index.prompt[number])[::-1][:SHOWN]
    return [
        {"at": int(index.start[each]), "step": int(index.step[each]), "score": round_value(index.score[each])}
        for each in same.tolist()
    ]


def alike(here: ResponseLog, there: ResponseLog) -> list[Dispute]:
    """The newest answers of both runs to each shared prompt, those whose scores are nearest first.

    `numbers` are [here, there]; strength is minus the difference of the scores.
    """
    own, other = shared_prompts(here, there)
    apart = np.abs(here.score[own.last] - there.score[other.last])
    order = np.argsort(apart, kind="stable")
    both = zip(apart[order], own.last[order], other.last[order], strict=True)
    return [Dispute(-float(size), np.array([one, two])) for size, one, two in both if np.isfinite(size)]
