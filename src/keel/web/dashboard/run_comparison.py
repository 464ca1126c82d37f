"""Comparison of two runs by the prompts that both responded to."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel.run.read.compare import word_differences
from keel.run.read.curves import round_value
from keel.run.read.responses import Numbers, ResponseLog, as_text
from keel.web.dashboard.disputes import Dispute
from keel.web.dashboard.response_list import prompt_snippet

MAX_CHOICES = 200  # responses of each run to one prompt that a page offers
MAX_COMPARED = 20_000  # characters of two responses together, up to which they are compared word by word


@dataclass(frozen=True)
class PromptSummaries:
    """The P prompts of a run in ascending order of their key, with statistics of the responses to each."""

    prompts: Numbers  # [P]
    counts: Numbers  # [P]
    means: NDArray[np.float64]  # [P], mean score; NaN if no response has a score
    last: Numbers  # [P], index of the newest response

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

    def select(self, indices: Numbers) -> "PromptSummaries":
        return PromptSummaries(self.prompts[indices], self.counts[indices], self.means[indices], self.last[indices])


def shared_prompts(here: ResponseLog, there: ResponseLog) -> tuple[PromptSummaries, PromptSummaries]:
    """Return the summaries of both runs for the prompts that both responded to, in the same order."""
    one, other = PromptSummaries.from_responses(here), PromptSummaries.from_responses(there)
    _, first, second = np.intersect1d(one.prompts, other.prompts, assume_unique=True, return_indices=True)
    return one.select(first), other.select(second)


def shared_page(here: ResponseLog, there: ResponseLog, text: str, by: str, offset: int, limit: int) -> dict[str, Any]:
    """Return a page of the prompts that both runs responded to.

    Args:
        here: Responses of the first run.
        there: Responses of the second run.
        text: Only prompts whose text, or newest response, contains this; all if empty.
        by: Order: `newest` first, or the largest gain (`better`) or loss (`worse`) of the second run's mean score.
        offset: Number of prompts to skip.
        limit: Largest number of prompts to return.
    """
    one, other = shared_prompts(here, there)
    gain = other.means - one.means
    order = np.argsort({"better": -gain, "worse": gain}.get(by, -one.last), kind="stable")
    if text:
        matches = np.isin(one.last, here.with_text(np.sort(one.last), text))
        matches |= np.isin(other.last, there.with_text(np.sort(other.last), text))
        order = order[matches[order]]
    shown = order[offset : offset + limit]
    prompts = {number: as_text(prompt) for number, prompt, _ in here.texts(np.sort(one.last[shown]))}
    rows = [
        {
            "at": int(here.index.start[one.last[index]]),
            "there": int(there.index.start[other.last[index]]),
            "prompt": prompt_snippet(prompts[int(one.last[index])]),
            "counts": [int(one.counts[index]), int(other.counts[index])],
            "means": [round_value(one.means[index]), round_value(other.means[index])],
        }
        for index in shown.tolist()
    ]
    return {"total": len(one.prompts), "matched": len(order), "offset": offset, "rows": rows}


def response_pair(here: ResponseLog, there: ResponseLog, one: int, other: int) -> dict[str, Any]:
    """Return two responses in full, their word differences, and the other responses to the same prompt."""
    rows = [here.rows([one])[0], there.rows([other])[0]]
    texts = [str(row.get("response", "")) for row in rows]
    is_short = sum(map(len, texts)) <= MAX_COMPARED
    return {
        "rows": rows,
        "prompts": [as_text(row.get("prompt", "")) for row in rows],
        "differences": word_differences(*texts) if is_short else [],
        "choices": [_choices(here, one), _choices(there, other)],
    }


def _choices(responses: ResponseLog, number: int) -> list[dict[str, Any]]:
    """Return the newest responses to the same prompt, newest first."""
    index = responses.index
    same = np.flatnonzero(index.prompt == index.prompt[number])[::-1][:MAX_CHOICES]
    return [
        {"at": int(index.start[each]), "step": int(index.step[each]), "score": round_value(index.score[each])}
        for each in same.tolist()
    ]


def disputes_between_runs(here: ResponseLog, there: ResponseLog) -> list[Dispute]:
    """Return the newest responses of both runs to each shared prompt, those with the closest scores first.

    The `numbers` of a dispute are [index in here, index in there]. Its strength is minus the score difference.
    """
    one, other = shared_prompts(here, there)
    difference = np.abs(here.score[one.last] - there.score[other.last])
    order = np.argsort(difference, kind="stable")
    pairs = zip(difference[order], one.last[order], other.last[order], strict=True)
    return [Dispute(-float(size), np.array([first, second])) for size, first, second in pairs if np.isfinite(size)]
