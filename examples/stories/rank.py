"""Stand in for a human rater: rank sampled answers by how cheerful they are. The rater sees nothing but the texts.

python rank.py answers.jsonl rankings.jsonl
"""

import json
import sys
from pathlib import Path

from vader import compound


def ranks(answers: list[str]) -> list[int]:
    """1 is the most cheerful; answers that are equally cheerful share a rank."""
    scores = [round(compound(answer), 2) for answer in answers]
    levels = sorted(set(scores), reverse=True)
    return [levels.index(score) + 1 for score in scores]


def main(source: Path, target: Path) -> None:
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    ranked = [{**row, "ranks": ranks(row["responses"])} for row in rows]
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ranked), encoding="utf-8")
    print(f"{len(ranked)} rankings of {len(ranked[0]['responses'])} answers: {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
