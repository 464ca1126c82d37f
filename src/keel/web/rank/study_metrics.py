"""The owner's figures, worked out here or, so that nobody waits for them, in a process of their own."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from keel.ranking.database import StoreError
from keel.ranking.store import Store

NICE = 10


def store_metrics(store: Store) -> dict[str, Any]:
    """What `agreement.summary` says of a store."""
    from keel.ranking.agreement import summary  # with numpy, for which no rater should wait

    return summary(store.judgements(), store.items(), store.raters(), store.overlap)


def store_metrics_in_subprocess(path: Path) -> dict[str, Any]:
    """The same, of a store that this process has open, by another process. Raises StoreError."""
    command = [sys.executable, "-m", "keel.web.rank.study_metrics", str(path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise StoreError(f"the figures cannot be worked out: {last:.200}", str(path))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(path: str) -> None:
    if hasattr(os, "nice"):
        os.nice(NICE)  # raters come first
    with closing(Store.reading(path)) as store:
        json.dump(store_metrics(store), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
