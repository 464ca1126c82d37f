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
    """What is in doubt, or too few to say, is for people to look at (keel rank WEEK.rank.jsonl); the model stays."""
    says = file["figures"]["verdict"]["reward_model"]
    print(f"the reward model: {says}")
    return "the reward model does not apply" if says == "does not apply" else ""


if __name__ == "__main__":
    failed = {"raters": raters, "drift": drift}[sys.argv[1]](json.load(sys.stdin), *sys.argv[2:])
    print(f"gate {sys.argv[1]}: {failed or 'passed'}")
    sys.exit(bool(failed))
