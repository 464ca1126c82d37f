"""Names of scorers: computed once, in the settings, and each there once."""

import itertools
from typing import Any

import pytest

from keel.config import EvaluateConfig, TrainConfig, parse
from keel.errors import CheckpointError, ConfigError
from keel.run.read.settings import check_run_settings

NEEDED = {"output": "o", "policy": {"model": "m"}, "prompts": {"path": "p"}}


def names(*rewards: dict[str, Any]) -> list[str | None]:
    config = parse(TrainConfig, {**NEEDED, "rewards": list(rewards)})
    evaluated = parse(EvaluateConfig, {"policy": "m", "prompts": {"path": "p"}, "rewards": list(rewards)})
    found = [source.name for source in config.rewards]
    assert [source.name for source in evaluated.rewards] == found
    again = parse(TrainConfig, config.model_dump(mode="json"))  # as --resume and the doctor read them
    assert again == config
    return found


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"function": "a/b.py:quality"}, "quality"),
        ({"model": "runs/helpful/model"}, "helpful"),
        ({"model": "runs/helpful/model/"}, "helpful"),
        ({"model": "runs/helpful/model/adapter"}, "helpful"),
        ({"model": "runs/helpful/members/1/model"}, "members_1"),
        ({"model": "owner/reward-7b"}, "reward-7b"),
        ({"model": "model"}, "model"),
        ({"model": "../model"}, "model"),
        ({"url": "http://127.0.0.1:5000/get_reward?x=1"}, "get_reward"),
        ({"url": "http://127.0.0.1:5000/"}, "127.0.0.1_5000"),
        ({"function": "a.py:f", "name": "mine"}, "mine"),
    ],
)
def test_the_default_says_what_it_is(source: dict[str, Any], name: str) -> None:
    assert names(source) == [name]


def test_no_two_scorers_share_a_name() -> None:
    score, other = {"function": "a.py:score"}, {"function": "b.py:score"}
    assert names(score, other, {"function": "c.py:score_2"}) == ["score", "score_2", "score_2_2"]
    assert names({"function": "c.py:score_2"}, score, other) == ["score_2", "score", "score_3"]
    assert names(score, {**other, "name": "score"}) == ["score_2", "score"]  # a given name comes first
    assert names({"model": "a/model"}, {"model": "b/model"}, {"model": "c/a/model"}) == ["a", "b", "a_2"]


def test_no_name_is_the_interval_of_another() -> None:
    """keel evaluate writes rewards/NAME_low and rewards/NAME_high beside rewards/NAME."""
    assert names({"function": "a.py:score"}, {"function": "a.py:score_low"}) == ["score", "score_low_2"]
    assert names({"function": "a.py:score_high"}, {"function": "a.py:score"}) == ["score_high", "score_2"]


@pytest.mark.parametrize("second", ["mine", "mine_low"])
def test_two_given_names_that_clash_are_refused(second: str) -> None:
    for first, last in itertools.permutations(["mine", second]):
        with pytest.raises(ConfigError, match=r"rewards: .*mine"):
            names({"function": "a.py:f", "name": first}, {"function": "a.py:g", "name": last})


@pytest.mark.parametrize("name", ["", "a/b", "a b", "../x", "-x"])
def test_a_name_is_part_of_a_metrics_key(name: str) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.0\.name"):
        names({"function": "a.py:f", "name": name})


@pytest.mark.parametrize("rewards", [[{"function": "a.py:f", "name": "x"}] * 2, [{"function": "a.py:f", "name": 3}]])
def test_the_doctor_refuses_settings_in_which_names_clash(rewards: list[Any]) -> None:
    with pytest.raises(CheckpointError, match="rewards"):
        check_run_settings({"rewards": rewards, "rollout": {}}, "train", "config.yaml")
