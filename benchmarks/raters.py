"""Simulate raters of a large study: how long `keel rank` takes for a page, a ranking and the statistics.

python benchmarks/raters.py --items 100000 --raters 50 --think 2 --seconds 60
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from keel.data.items import UnrankedResponses
from keel.ranking.store import Store

PORT = 8731


@dataclass
class Seen:
    """Response times and errors of one client."""

    pages: list[float] = field(default_factory=list)  # seconds
    rankings: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)  # statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--raters", type=int, default=50)
    parser.add_argument("--think", type=float, default=2.0, help="mean seconds between a page and its ranking")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--ranked", type=int, default=0, help="items that are ranked already")
    parser.add_argument("--owner", action="store_true", help="keep the owner's page open")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ratings.db"
        names = [f"rater {i}" for i in range(given.raters)]
        fill(path, names, given.items, given.ranked)
        flags = [f"--store={path}", f"--port={PORT}", "--overlap=2", "--browser=false"]
        server = subprocess.Popen(
            [sys.executable, "-m", "keel.cli.main", "rank", *flags], stdout=subprocess.PIPE, text=True
        )
        try:
            measure(links(server), given.think, given.seconds, given.owner)
        finally:
            server.terminate()
            server.wait()


def fill(path: Path, names: list[str], items: int, ranked: int) -> None:
    with closing(Store.open(str(path), overlap=2)) as store:
        store.add_items(
            UnrankedResponses(f"question {i} " * 20, (f"one {i} " * 40, f"two {i} " * 50)) for i in range(items)
        )
        store.add_raters(names)
        with store.together():
            for number in range(ranked):
                deal = store.deal(names[number % len(names)])
                assert deal is not None
                store.record_judgement(names[number % len(names)], deal.id, [1, 2], seconds=1.0)


def links(server: "subprocess.Popen[str]") -> dict[str, str]:
    found: dict[str, str] = {}
    assert server.stdout is not None
    while "owner" not in found:
        name, _, link = server.stdout.readline().strip().partition(": ")
        found[name] = link
    return {name: link for name, link in found.items() if link.startswith("http")}


def measure(found: dict[str, str], think: float, seconds: float, owner: bool) -> None:
    end = time.monotonic() + seconds
    seen = {name: Seen() for name in found}
    work = [
        threading.Thread(target=rate, args=(link, think, end, seen[name]))
        for name, link in found.items()
        if name != "owner"
    ]
    if owner:
        work.append(threading.Thread(target=watch, args=(found["owner"], end, seen["owner"])))
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    raters = [each for name, each in seen.items() if name != "owner"]
    for what in ("pages", "rankings"):
        print(f"{what}: {quantiles([value for each in raters for value in getattr(each, what)])}")
    print(f"owner's figures: {quantiles(seen['owner'].pages)}")
    print(f"refused: {dict(Counter(status for each in seen.values() for status in each.refused))}")


def rate(link: str, think: float, end: float, seen: Seen) -> None:
    draw = random.Random(link)
    with httpx.Client(timeout=60) as client:
        address = link[: link.index("/enter")]
        client.get(link)
        time.sleep(draw.random() * think)
        while time.monotonic() < end:
            began = time.monotonic()
            page = client.get(f"{address}/rank")
            seen.pages.append(time.monotonic() - began)
            match = re.search(r'data-deal="(.*?)" data-csrf="(.*?)"', page.text)
            if page.status_code != 200 or match is None:
                seen.refused.append(page.status_code)
                continue
            time.sleep(draw.uniform(0.5, 1.5) * think)
            body = {"deal": match[1], "ranks": [1, 2], "comment": "", "tags": [], "seconds": 1.0}
            began = time.monotonic()
            said = client.post(
                f"{address}/judgements", json=body, headers={"Origin": address, "X-Keel-Token": match[2]}
            )
            seen.rankings.append(time.monotonic() - began)
            if said.status_code != 200:
                seen.refused.append(said.status_code)


def watch(link: str, end: float, seen: Seen) -> None:
    with httpx.Client(timeout=120) as client:
        client.get(link)
        while time.monotonic() < end:
            began = time.monotonic()
            found = client.get(f"{link[: link.index('/enter')]}/owner/stats.json")
            seen.pages.append(time.monotonic() - began)
            if found.status_code != 200:
                seen.refused.append(found.status_code)
            time.sleep(2)


def quantiles(values: list[float]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    shown = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    parts = [
        f"{name} {ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1000:.0f} ms"
        for name, share in shown.items()
    ]
    return f"{len(ordered)}, " + ", ".join(parts)


if __name__ == "__main__":
    main()
