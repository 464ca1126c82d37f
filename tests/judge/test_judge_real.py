"""A judge behind the real server that KEEL_JUDGE_URL names, with the model KEEL_JUDGE_MODEL."""

import os
import random
from pathlib import Path

import pytest

from keel.errors import RewardError
from keel.judge.comparisons import Group, rank_groups
from keel.judge.judge import Judge, NoVerdict

from .endpoint import JudgeEndpoint

URL, MODEL = os.environ.get("KEEL_JUDGE_URL"), os.environ.get("KEEL_JUDGE_MODEL", "default")
pytestmark = pytest.mark.skipif(URL is None, reason="needs an OpenAI-compatible server: set KEEL_JUDGE_URL")
RUBRIC = "A response is better the more correct it is. Nonsense and empty phrases are worst."
GOLD = [
    ("What is 2 + 2?", ["4", "5", "banana banana"]),
    ("Name the capital of France.", ["The capital of France is Paris.", "It is Rome.", "xq zz"]),
]


def test_rankings_are_read_and_cached(tmp_path: Path) -> None:
    judge = ready_judge(tmp_path)
    groups = shuffled_groups(10)
    first = rank_groups(judge, [group for group, _ in groups])
    usage = judge.take_usage()
    assert usage.requests + usage.cached >= len(groups)
    assert usage.input_tokens > 0
    assert rank_groups(ready_judge(tmp_path), [group for group, _ in groups]) == first
    verdicts = [ranks for ranks in first if not isinstance(ranks, NoVerdict)]
    assert all(min(ranks) >= 1 and max(ranks) <= len(ranks) == 3 for ranks in verdicts)
    assert usage.failed == len(groups) - len(verdicts)  # a small model without a grammar may fail at all of them


def test_another_model_is_named_in_the_error(tmp_path: Path) -> None:
    judge = Judge(JudgeEndpoint().settings(tmp_path, url=URL, model="no/such-model", timeout_seconds=60.0))
    with pytest.raises(RewardError, match=r"HTTP 4\d\d"):
        judge.ask([judge.writer.score("q", "r", (1, 5))])


def ready_judge(folder: Path) -> Judge:
    (folder / "rubric.txt").write_text(RUBRIC)
    settings = JudgeEndpoint().settings(folder, url=URL, model=MODEL, reasons=False, max_tokens=64)
    return Judge(settings.model_copy(update={"timeout_seconds": 600.0}))


def shuffled_groups(count: int) -> list[tuple[Group, list[int]]]:
    """Groups of three responses, with their order by their author: rank 1 is best."""
    draws, groups = random.Random(0), []
    for number in range(count):
        prompt, responses = GOLD[number % len(GOLD)]
        order = draws.sample(range(3), 3)
        text = f"{prompt} ({number})"
        groups.append((Group(text, tuple(responses[place] for place in order)), [place + 1 for place in order]))
    return groups
