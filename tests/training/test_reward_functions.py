"""What a run of training says and does about reward functions that fail."""

from pathlib import Path
from typing import Any

import pytest

from keel.errors import ConfigError, RewardError

from ..runs import PROMPTS, train


def test_the_first_failure_is_told_where_responses_are_dropped(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def picky(completions: list[str]) -> list[float | None]:
        return [float("inf") if len(text) % 2 else 1.0 for text in completions]

    metrics = train(tiny_policy, tmp_path / "run", {"reward.on_failure": "drop", "steps": 2}, [picky])
    assert 0 < metrics[0]["reward/dropped"] < 1
    told = [line for line in capsys.readouterr().err.splitlines() if "picky" in line]
    assert len(told) == 1
    assert "inf is not a finite number: sample" in told[0]


@pytest.mark.parametrize("calls", [0, 4])
def test_only_a_run_that_has_begun_can_be_resumed(tiny_policy: Path, tmp_path: Path, calls: int) -> None:
    made: list[int] = []

    def breaks(completions: list[str]) -> list[float]:
        made.append(len(completions))
        if len(made) > calls:
            raise LookupError("no such file")
        return [0.0 for _ in completions]

    with pytest.raises(RewardError, match="LookupError: no such file") as caught:
        train(tiny_policy, tmp_path / "run", {"steps": 3}, [breaks])
    assert ("--resume" in str(caught.value)) == (calls > 0)
    if not calls:  # so it is started again, with the same command
        train(tiny_policy, tmp_path / "run", {"steps": 1}, [lambda completions: [0.0 for _ in completions]])


def test_a_parameter_that_nobody_passes_stops_before_the_models_are_loaded(tmp_path: Path, tiny_policy: Path) -> None:
    def reads(responses: Any) -> list[float]:
        return [0.0 for _ in responses]

    rows = [{"prompt": text, "topic": "x"} for text in PROMPTS]
    with pytest.raises(ConfigError, match=r"takes `responses`.*topic"):
        train(tiny_policy, tmp_path / "run", {}, [reads], rows)
    assert not (tmp_path / "run").exists()


def test_a_sparse_column_comes_to_every_call(tiny_policy: Path, tmp_path: Path) -> None:
    """Steps whose prompts have no value get one None for each completion."""
    seen: list[Any] = []

    def reads(completions: list[str], answer: list[Any]) -> list[float]:
        seen.append(answer)
        return [0.0 for _ in completions]

    rows = [{"prompt": "w1", "answer": "w2"}, *({"prompt": f"w{number}"} for number in range(3, 12))]
    changes = {"steps": 4, "rollout.batch_size": 2, "algorithm.minibatch_size": 2}
    train(tiny_policy, tmp_path / "run", changes, [reads], rows)
    assert [None, None] in seen
    assert any("w2" in each for each in seen)
