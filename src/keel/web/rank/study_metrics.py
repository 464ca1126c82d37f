"""Statistics for the owner's page, computed in this process or, so that raters need not wait, in a separate one."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from keel.ranking.database import StoreError
from keel.ranking.store import Store

NICENESS = 10


def store_metrics(store: Store) -> dict[str, Any]:
    """Return `agreement.summary` of a store."""
    from keel.ranking.agreement import summary  # imports numpy, which the first page need not wait for

    return summary(store.judgements(), store.items(), store.raters(), store.overlap, store.judges())


def store_metrics_in_subprocess(path: Path) -> dict[str, Any]:
    """Return the same from a separate process, while this one has the store open. Raises StoreError."""
    command = [sys.executable, "-m", "keel.web.rank.study_metrics", str(path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        last_line = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise StoreError(
            f"the statistics cannot be computed: {last_line:.200}", str(path), "see the terminal of keel rank"
        )
    metrics: dict[str, Any] = json.loads(done.stdout)
    return metrics


def main(path: str) -> None:
    if hasattr(os, "nice"):
        os.nice(NICENESS)  # raters come first
    with closing(Store.reading(path)) as store:
        json.dump(store_metrics(store), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
