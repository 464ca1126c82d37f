"""Make faulty and healthy runs of `keel train`, and measure how well `keel doctor` distinguishes them.

The runs use the quickstart's example. Each faulty run has one fault.

    python benchmarks/zoo.py make --output runs/zoo --seeds 0 1 2 3
    python benchmarks/zoo.py score --output runs/zoo --seeds 2 3

A seed takes a minute or two for its models, and half a minute for each run. Finished runs are not repeated.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from zoo_cases import CASES, names_of


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("do", choices=["make", "score"])
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument("--jobs", type=int, default=1, help="number of concurrent runs")
    given = options.parse_args()
    if given.do == "make":
        make(given)
    else:
        from zoo_score import score

        score(given.output / "runs", [(name, seed) for seed, name in wanted(given)])


def wanted(given: argparse.Namespace) -> list[tuple[int, str]]:
    return [(seed, name) for seed in given.seeds for name in names_of(seed) if name in given.only]


def make(given: argparse.Namespace) -> None:
    """Make the models of each seed, then its runs, each in a new process."""
    from zoo_make import make_run
    from zoo_world import make_world

    with ProcessPoolExecutor(given.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for seed in given.seeds:
            world = pool.submit(make_world, given.output / f"world-{seed}", seed).result()
            names = [name for at, name in wanted(given) if at == seed]
            jobs = {
                name: pool.submit(make_run, given.output / "runs" / f"{name}-{seed}", world, name, seed)
                for name in names
            }
            for name, job in jobs.items():
                if error := job.exception():  # one run that cannot be made keeps no other from being made
                    print(f"{name}-{seed}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
