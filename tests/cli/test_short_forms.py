"""--reward-model and --reward-function: scorers without JSON in a shell."""

import json
from pathlib import Path
from typing import Any

import pytest

from keel import config
from keel.cli import main as cli
from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.errors import ConfigError

VERBS: dict[str, tuple[type[config.Settings], list[str]]] = {
    "train": (config.TrainConfig, ["--output", "run", "--policy.model", "m", "--prompts.path", "p"]),
    "plan": (config.PlanConfig, ["--output", "run", "--policy.model", "m", "--prompts.path", "p"]),
    "evaluate": (config.EvaluateConfig, ["--policy", "m", "--prompts.path", "p"]),
}


def scorers(verb: str, *more: str) -> list[dict[str, Any]]:
    """The scorers of a command line, without what is left at its default."""
    settings, given = VERBS[verb]
    rewards = read_command(Verb(verb, settings), [*more, *given]).settings.rewards  # type: ignore[attr-defined]
    return [source.model_dump(exclude_defaults=True, exclude={"name"}) for source in rewards]


@pytest.mark.parametrize("verb", VERBS)
def test_each_flag_adds_a_scorer_in_the_order_of_the_command_line(verb: str):
    given = ["--reward-model", "a/model", "--reward-function", "f.py:f", "--reward_model=b/model"]
    assert scorers(verb, *given) == [{"model": "a/model"}, {"function": "f.py:f"}, {"model": "b/model"}]
    assert scorers(verb) == []


def test_they_are_the_settings_that_json_gives():
    short = scorers("train", "--reward-model", "a/model", "--reward-function", "f.py:f")
    assert short == scorers("train", "--rewards", '[{"model": "a/model"}, {"function": "f.py:f"}]')


def test_they_are_added_to_those_of_the_flag_and_of_the_file(tmp_path: Path):
    flag = ["--rewards", json.dumps({"model": "a/model", "weight": 2.0})]
    assert scorers("train", *flag, "--reward-model", "b") == [{"model": "a/model", "weight": 2.0}, {"model": "b"}]
    file = tmp_path / "run.yaml"
    file.write_text("rewards: [{model: c, weight: 3.0}]\n")
    assert scorers("train", str(file), "--reward-model", "b") == [{"model": "c", "weight": 3.0}, {"model": "b"}]
    assert scorers("train", str(file), *flag, "--reward-model", "b")[0] == {"model": "a/model", "weight": 2.0}
    assert scorers("train", str(file), "--rewards", "[]", "--reward-model", "b") == [{"model": "b"}]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--reward-model", "a", "--reward-model", "a"], ["rewards", "model a", "--reward-model"]),
        (["--rewards", '{"function": "f.py:f"}', "--reward-function", "f.py:f"], ["f.py:f", "--reward-function"]),
        (["--reward-function", "f.py"], ["--reward-function", "FILE.py:NAME", "'f.py'"]),
        (["--reward-function", "f.py:not a name"], ["--reward-function", "FILE.py:NAME"]),
        (["--reward-function", '{"function": "f.py:f"}'], ["--reward-function", "--rewards"]),
        (["--reward-model", '{"model": "a"}'], ["--reward-model", "--rewards"]),
        (["--reward-model", "f.py:f"], ["--reward-model", "--reward-function"]),
        (["--reward-model", ""], ["--reward-model"]),
        (["--reward-model"], ["--reward-model", "needs a value"]),
        (["--reward-modle", "a"], ["--reward-modle", "did you mean --reward-model?"]),
        (["--rewards", "3", "--reward-model", "a"], ["rewards"]),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    flags: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["train", *VERBS["train"][1], *flags]) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert [part for part in parts if part not in shown] == []


def test_a_file_whose_rewards_are_no_list_is_refused(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("rewards: {model: c}\n")
    with pytest.raises(ConfigError, match="rewards"):
        scorers("train", str(file), "--reward-model", "b")


def test_verbs_without_scorers_do_not_know_them(capsys: pytest.CaptureFixture[str]):
    given = ["--output", "run", "--model", "m", "--data.path", "p", "--reward-model", "a"]
    assert cli.main(["sft", *given]) == 2
    assert "unknown setting --reward-model" in capsys.readouterr().err
