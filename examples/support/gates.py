"""Check the two gates that are not settings of a keel command. The exit code is 1 if a gate is not met.

keel rank --stats --json | python gates.py raters 0.5
keel drift ... --json | python gates.py drift
"""

import json
import sys


def raters(metrics: dict, minimum: str) -> str:
    """Return why the raters do not agree enough: the lower end of the interval of alpha is below the minimum."""
    low = metrics["alpha"]["low"]
    return "" if low >= float(minimum) else f"raters agree too little: alpha may be as low as {low:.2f}"


def drift(result: dict) -> str:
    """Return why the reward model is not usable.

    With other verdicts the model stays in use, and people look at the responses (keel rank WEEK.rank.jsonl).
    """
    verdict = result["figures"]["verdict"]["reward_model"]
    print(f"reward model: {verdict}")
    return "the reward model does not apply" if verdict == "does not apply" else ""


if __name__ == "__main__":
    problem = {"raters": raters, "drift": drift}[sys.argv[1]](json.load(sys.stdin), *sys.argv[2:])
    print(f"gate {sys.argv[1]}: {problem or 'passed'}")
    sys.exit(bool(problem))
