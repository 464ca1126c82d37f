"""Replace responses of a scored batch by others."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from keel.core.rewards import place_scores
from keel.data.batches import Rollouts, ScoredRollouts, select_rows


def replace_rows(scored: ScoredRollouts, rows: Sequence[int], new: ScoredRollouts) -> ScoredRollouts:
    """Return the batch with other responses in these rows. What reward functions logged of both is kept.

    Args:
        new: one response for each entry of `rows`, in this order; it may be empty.
    """
    count, places = len(scored.kept), {row: place for place, row in enumerate(rows)}
    order = [count + places[row] if row in places else row for row in range(count)]

    def merge(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second])[torch.as_tensor(order, device=first.device)]

    def merge_all(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: merge(values, second[name]) for name, values in first.items()}

    rollouts = select_rows(join_rollouts(scored.rollouts, new.rollouts), order)
    names = dict.fromkeys([*scored.columns, *new.columns])
    columns = {
        name: [*scored.columns.get(name, [None] * count), *new.columns.get(name, [None] * len(rows))] for name in names
    }
    logged = dict.fromkeys([*scored.logged, *new.logged])
    return replace(
        scored,
        rollouts=rollouts,
        scores=merge(scored.scores, new.scores),
        segment_scores=_merge_segments(scored, new, order, rollouts),
        by_scorer=merge_all(scored.by_scorer, new.by_scorer),
        kept=merge(scored.kept, new.kept),
        disagreement=merge_all(scored.disagreement, new.disagreement),
        cut=merge_all(scored.cut, new.cut),
        failures={**new.failures, **scored.failures},
        logged={name: [*scored.logged.get(name, []), *new.logged.get(name, [])] for name in logged},
        columns={name: [values[row] for row in order] for name, values in columns.items()},
    )


def join_rollouts(first: Rollouts, second: Rollouts) -> Rollouts:
    """Return the rows of both, padded to the wider prompts and responses."""
    joined: dict[str, Any] = {}
    for name in (each.name for each in fields(first)):
        one, other = getattr(first, name), getattr(second, name)
        if one is None or other is None:  # values, which group baselines need not
            continue
        if isinstance(one, list):
            joined[name] = [*one, *other]
        elif one.dim() == 1:
            joined[name] = torch.cat([one, other])
        else:
            joined[name] = _stack(one, other, left=name.startswith("prompt_"))
    return Rollouts(**joined)


def _stack(first: Tensor, second: Tensor, left: bool) -> Tensor:
    """Pad two tensors [B, L] to the same width by zeros, and concatenate their rows."""
    width = max(first.shape[1], second.shape[1])
    gaps = [width - each.shape[1] for each in (first, second)]
    both = zip((first, second), gaps, strict=True)
    return torch.cat([pad(each, (gap, 0) if left else (0, gap)) for each, gap in both])


def _merge_segments(scored: ScoredRollouts, new: ScoredRollouts, order: list[int], rollouts: Rollouts) -> Tensor | None:
    """Return the token scores [B, T] of a merged batch; None if no scorer scored segments."""
    if scored.segment_scores is None and new.segment_scores is None:
        return None
    first, second = (_token_scores(each) for each in (scored, new))
    index = torch.as_tensor(order, device=scored.scores.device)
    return _stack(first, second, left=False)[index, : rollouts.response_mask.shape[1]]


def _token_scores(scored: ScoredRollouts) -> Tensor:
    if scored.segment_scores is not None:
        return scored.segment_scores
    return place_scores(scored.scores, scored.rollouts.response_mask)
