"""Several files of prompts, their weights, and the filter by measured scores."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import keel
from keel.config import TrainConfig, parse
from keel.data.difficulty import mean_scores
from keel.data.prompts import Prompt
from keel.errors import ConfigError, DataError
from keel.training.prompt_order import Mixture, draw_prompts

from ..runs import contents, lines, settings, share_of_w3, train, without_clock
from .test_resume import train_until_killed


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(path: Path, *prompts: str) -> str:
    return write(path, [{"prompt": prompt} for prompt in prompts])


def prompts_used(folder: Path) -> Counter[str]:
    return Counter(row["prompt"] for row in lines(folder / "rollouts.jsonl"))


def test_turns_by_hand() -> None:
    """Shares 3/4 and 1/4: draws are due at 2/3, 2, 10/3, 14/3, ... and at 2, 6, ...; the first file goes first."""
    mixture = Mixture((5, 5), (3.0, 1.0))
    assert mixture.turns(0, 8) == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]


def test_turns_from_any_position_are_a_part_of_the_same_sequence() -> None:
    mixture = Mixture((5, 3, 7), (0.7, 0.1, 0.2))
    sequence = mixture.turns(0, 200)
    assert all(mixture.turns(first, 9) == sequence[first : first + 9] for first in range(190))
    for file, share in enumerate((140, 20, 40)):
        drawn = [draw for number, draw in sequence if number == file]
        assert drawn == list(range(len(drawn)))
        assert abs(len(drawn) - share) <= 1


def test_each_file_is_passed_through_on_its_own() -> None:
    """Of 40 draws, 30 from three prompts (ten passes) and 10 from five (two passes)."""
    prompts = [Prompt(text, text, (), {}) for text in "abcvwxyz"]
    drawn = Counter(prompt.text for prompt in draw_prompts(prompts, 0, 0, 40, Mixture((3, 5), (3.0, 1.0))))
    assert drawn == {"a": 10, "b": 10, "c": 10, "v": 2, "w": 2, "x": 2, "y": 2, "z": 2}


def test_a_run_draws_by_weight(tiny_policy: Path, tmp_path: Path) -> None:
    others = [{"path": texts(tmp_path / "b.jsonl", "w5", "w6"), "weight": 1}]
    changes = {
        "prompts.path": texts(tmp_path / "a.jsonl", "w1", "w2", "w4"),
        "prompts.weight": 3,
        "prompts.others": others,
        "log.rollouts_per_step": 16,
    }
    values = settings(tiny_policy, tmp_path / "run", changes)
    keel.train(values, [share_of_w3])
    assert prompts_used(tmp_path / "run") == {"w1": 8, "w2": 8, "w4": 8, "w5": 4, "w6": 4}


def test_without_weights_all_prompts_are_drawn_equally_often(tiny_policy: Path, tmp_path: Path) -> None:
    others = [{"path": texts(tmp_path / "b.jsonl", "w5")}]
    given = {"prompts.path": texts(tmp_path / "a.jsonl", "w1", "w2", "w4"), "prompts.others": others}
    keel.train(settings(tiny_policy, tmp_path / "run", {**given, "log.rollouts_per_step": 16}), [share_of_w3])
    assert prompts_used(tmp_path / "run") == {"w1": 8, "w2": 8, "w4": 8, "w5": 8}


def test_a_resumed_run_with_weights_and_resampling_is_the_straight_run(tiny_policy: Path, tmp_path: Path) -> None:
    changes = {
        "steps": 4,
        "checkpoint.every": 2,
        "prompts.path": texts(tmp_path / "a.jsonl", "w1", "w2", "w4"),
        "prompts.weight": 2,
        "prompts.others": [{"path": texts(tmp_path / "b.jsonl", "w5", "w6"), "weight": 1}],
        "algorithm.name": "grpo",
        "rollout.group_size": 2,
        "rollout.resample_rounds": 2,
    }
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    expected = train(tiny_policy, straight, changes, prompts=None)
    train_until_killed(tiny_policy, resumed, changes, step=4, prompts=None)
    assert without_clock(train(tiny_policy, resumed, changes, prompts=None, resume=True)) == without_clock(expected)
    assert contents(resumed) == contents(straight)


def test_a_changed_further_file_ends_a_resumed_run(tiny_policy: Path, tmp_path: Path) -> None:
    others = [{"path": texts(tmp_path / "b.jsonl", "w5")}]
    given = {"prompts.path": texts(tmp_path / "a.jsonl", "w1"), "prompts.others": others, "steps": 1}
    keel.train(settings(tiny_policy, tmp_path / "run", given), [share_of_w3])
    texts(tmp_path / "b.jsonl", "w6")
    with pytest.raises(ConfigError, match="has changed since the run began"):
        keel.train(settings(tiny_policy, tmp_path / "run", {**given, "steps": 2}), [share_of_w3], resume=True)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"weight": 2, "others": [{"path": "b"}]}, "set the weight of every file of prompts, or of none"),
        ({"weight": 2}, "weight mixes several files"),
        ({"difficulty": {"path": "s.json"}}, "set min_score, max_score or both"),
        ({"difficulty": {"path": "s", "min_score": 1, "max_score": 0}}, "min_score 1 is above max_score 0"),
    ],
)
def test_settings_that_are_refused(prompts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(TrainConfig, settings(Path("m"), Path("o"), {"prompts": {"path": "a", **prompts}}))


def test_files_and_prompts_in_python_are_not_mixed(tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompts are passed in Python, so no file is mixed"):
        train(tiny_policy, tmp_path / "run", {"prompts.others": [{"path": "b.jsonl"}]})


def test_prompts_outside_the_window_are_left_out(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean of w1 is 0.25; the limits themselves are inside."""
    scores = {"w1": [0.0, 0.5], "w2": [1.0], "w4": [0.0], "w5": [0.9], "w6": [0.1]}
    rows = [{"prompt": prompt, "score": score} for prompt, values in scores.items() for score in values]
    changes = {
        "prompts.path": texts(tmp_path / "a.jsonl", *scores),
        "prompts.difficulty": {"path": write(tmp_path / "s.jsonl", rows), "min_score": 0.1, "max_score": 0.9},
        "log.rollouts_per_step": 16,
    }
    keel.train(settings(tiny_policy, tmp_path / "run", changes), [share_of_w3])
    assert prompts_used(tmp_path / "run").keys() == {"w1", "w5", "w6"}
    assert "3 of 5 prompts are used: 1 score too low, 1 too high" in capsys.readouterr().err


def test_the_file_of_an_evaluation_is_read(tiny_policy: Path, tmp_path: Path) -> None:
    """What `keel evaluate` writes is what training reads."""
    prompts = texts(tmp_path / "a.jsonl", "w1", "w2", "w4")
    reward = tmp_path / "mine.py"
    reward.write_text("def only_w2(prompts, completions):\n    return [float(prompt == 'w2') for prompt in prompts]\n")
    scorer = {"function": f"{reward}:only_w2"}
    output = str(tmp_path / "scores.json")
    sampling = {"num_responses": 2, "max_response_tokens": 4}
    given = {"policy": [str(tiny_policy)], "prompts": {"path": prompts}, "rewards": [scorer], "sampling": sampling}
    keel.evaluate({**given, "output": output})
    assert mean_scores(output) == {"w1": 0.0, "w2": 1.0, "w4": 0.0}
    changes = {"prompts.path": prompts, "prompts.difficulty": {"path": output, "max_score": 0.5}}
    keel.train(settings(tiny_policy, tmp_path / "run", {**changes, "log.rollouts_per_step": 16}), [share_of_w3])
    assert prompts_used(tmp_path / "run").keys() == {"w1", "w4"}


@pytest.mark.parametrize(
    ("rows", "limits", "message"),
    [
        ([{"prompt": "w1", "score": 1}], {"min_score": 0}, "1 of 2 prompts have no score, such as 'w2'"),
        (
            [{"prompt": p, "score": 1} for p in ("w1", "w2")],
            {"max_score": 0},
            "no prompt has a score within .* 2 above",
        ),
        ([{"prompt": "w1", "score": "1"}], {"min_score": 0}, '"score"'),
    ],
)
def test_scores_that_cannot_be_used(
    rows: list[dict[str, Any]], limits: dict[str, float], message: str, tiny_policy: Path, tmp_path: Path
) -> None:
    difficulty = {"path": write(tmp_path / "s.jsonl", rows), **limits}
    with pytest.raises(DataError, match=message):
        train(tiny_policy, tmp_path / "run", {"prompts.difficulty": difficulty}, prompts=["w1", "w2"])


def test_an_evaluation_with_a_score_that_is_no_number(tmp_path: Path) -> None:
    output = tmp_path / "evaluation.json"
    output.write_text('{"answers": [{"prompt": "w1", "policy_scores": [NaN, 1.0]}]}')
    with pytest.raises(DataError, match="cannot read the scores of an evaluation: a score is not finite"):
        mean_scores(str(output))
