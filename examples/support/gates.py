"""The two gates that are no setting of a keel command; the exit code is 1 when one is not passed.

keel rank --stats --json | python gates.py raters 0.5
keel drift ... --json | python gates.py drift
"""

import json
import sys


def raters(figures: dict, least: str) -> str:
    """Krippendorff's alpha, and the lower end of its interval."""
    low = figures["alpha"]["low"]
    return "" if low >= float(least) else f"raters agree too little: alpha may be as low as {low:.2f}"


def drift(file: dict) -> str:
    says = file["figures"]["verdict"]["reward_model"]
    return "" if says == "applies" else f"the reward model: {says}"


if __name__ == "__main__":
    failed = {"raters": raters, "drift": drift}[sys.argv[1]](json.load(sys.stdin), *sys.argv[2:])
    print(f"gate {sys.argv[1]}: {failed or 'passed'}")
    sys.exit(bool(failed))
