"""Simulate raters: rank all responses, and write the same store as `keel rank`.

    python raters.py answers.jsonl ratings.db anna ben

To let people rank instead, run

    keel rank answers.jsonl --store ratings.db --raters anna --raters ben --overlap 2 --instructions guide.txt
"""

import random
import sys
from contextlib import closing

from keel.data.items import read_unranked_responses
from keel.quickstart.raters import rank_everything
from keel.ranking.store import Store


def main(answers: str, path: str, raters: list[str]) -> None:
    """Let every rater rank each item."""
    with closing(Store.open(path, overlap=len(raters))) as store:
        store.add_items(read_unranked_responses(answers))
        store.add_raters(raters)
        for rater in raters:
            rank_everything(store, rater, random.Random(rater))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
