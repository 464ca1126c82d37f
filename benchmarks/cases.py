"""Make every run that docs/diagnosis.md describes under "Cases", and print what that page quotes.

    python benchmarks/cases.py --output runs/cases
    python benchmarks/cases.py --output runs/cases --only a b

The commands are in cases.yaml. They run in the output folder, one after another. The output of a case is also written
to CASE.txt there. The quickstart's models take two minutes, a run of forty steps about one. An existing run is not
repeated (keel refuses, and the case continues): delete its folder first.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from zoo_world import make_world

HERE = Path(__file__).parent
CASES = yaml.safe_load((HERE / "cases.yaml").read_text(encoding="utf-8"))
PLACES = {"BENCHMARKS": str(HERE.resolve()), "SUPPORT": str(HERE.resolve().parent / "examples" / "support")}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--only", nargs="+", choices=list(CASES["cases"]), default=list(CASES["cases"]))
    given = options.parse_args()
    prepare(given.output)
    for name in given.only:
        (given.output / name).mkdir(exist_ok=True)
        with (given.output / f"{name}.txt").open("w", encoding="utf-8") as record:
            for command in CASES["cases"][name]:
                said = f"$ {command}\n{output_of(command, given.output)}\n"
                print(said, flush=True)
                record.write(said)


def prepare(folder: Path) -> None:
    """Make the quickstart's models, the shared settings and the reward functions."""
    make_world(folder / "world", seed=0)
    shutil.copy(HERE / "cases_functions.py", folder / "functions.py")
    for name, settings in CASES["settings"].items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "functions.py"], cwd=folder, check=True)


def output_of(command: str, folder: Path) -> str:
    """Return the output of a command without progress, and its exit code unless it is 0."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=os.environ | PLACES | {"PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "140"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = [line for line in found.stdout.splitlines() if not line.endswith(" left")]
    return "\n".join([*lines, *([f"exit code {found.returncode}"] if found.returncode else [])])


if __name__ == "__main__":
    main()
