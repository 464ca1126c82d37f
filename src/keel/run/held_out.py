"""What a reward model said of the held-out rankings: a line for each, which the report reads."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from keel.stats.preference_metrics import Scores
from keel.data.preferences import Ranking
from keel.run.folder import RunFolder, write_atomic

FILE = "held_out.jsonl"


def write_held_out(
    folder: RunFolder,
    rankings: Sequence[Ranking],
    scores: Scores,
    member_scores: Sequence[Sequence[Sequence[float]]] | None = None,
) -> None:
    """Rankings with `scores` and, of an ensemble, `member_scores` [members, responses]. Raises CheckpointError."""
    rows = [asdict(ranking) | {"scores": row} for ranking, row in zip(rankings, scores, strict=True)]
    for row, members in zip(rows, member_scores or [], strict=bool(member_scores)):
        row["member_scores"] = members
    write_atomic(folder.path / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
