"""Simulate a rater: rank sampled responses by how cheerful they are. The rater sees only the texts.

python rank.py answers.jsonl rankings.jsonl
"""

import json
import sys
from pathlib import Path

from vader import compound


def ranks(responses: list[str]) -> list[int]:
    """Rank responses, with 1 for the most cheerful. Equally cheerful responses share a rank."""
    scores = [round(compound(response), 2) for response in responses]
    levels = sorted(set(scores), reverse=True)
    return [levels.index(score) + 1 for score in scores]


def main(source: Path, target: Path) -> None:
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    ranked = [{**row, "ranks": ranks(row["responses"])} for row in rows]
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ranked), encoding="utf-8")
    print(f"{len(ranked)} rankings of {len(ranked[0]['responses'])} responses: {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
