"""The recipes in examples/: each holds settings that its verb takes, and the support blueprint runs as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from keel import config
from keel.evaluation.gate import check_demands, read_gate
from keel.evaluation.summary import known_metrics

EXAMPLES = Path(__file__).parents[1] / "examples"
SUPPORT = EXAMPLES / "support"
RECIPES = sorted(EXAMPLES.glob("*/*.yaml"))
VERBS: dict[str, type[config.Settings]] = {
    "sft": config.SftConfig,
    "sample": config.SampleConfig,
    "reward": config.RewardConfig,
    "train": config.TrainConfig,
    "evaluate": config.EvaluateConfig,
    "drift": config.DriftConfig,
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_is_short_and_says_which_verb_takes_it(recipe: Path):
    text = recipe.read_text(encoding="utf-8")
    verb = re.match(r"# keel (\w+) \S*" + re.escape(recipe.name), text)
    assert verb is not None, "the first line says how it is run"
    assert len(text.splitlines()) < 25
    config.parse(VERBS[verb[1]], yaml.safe_load(text))


def test_the_release_gate_asks_for_figures_that_there_are():
    recipe = config.parse(config.EvaluateConfig, yaml.safe_load((SUPPORT / "evaluate.yaml").read_text()))
    topics = [f"topic={topic}" for topic in ("late", "broken", "wrong", "refund", "cancel")]
    demands = read_gate(str(SUPPORT / "release.gate"))
    check_demands(demands, known_metrics([source.name for source in recipe.rewards]), topics)
    assert {demand.slice for demand in demands} == {None, *topics}, "no topic is let off"


def gate(name: str, figures: object, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SUPPORT / "gates.py"), name, *more]
    return subprocess.run(command, input=json.dumps(figures), capture_output=True, text=True, check=False)


def test_raters_who_may_agree_too_little_end_the_run():
    assert gate("raters", {"alpha": {"value": 0.5, "low": 0.41}}, "0.4").returncode == 0
    failed = gate("raters", {"alpha": {"value": 0.5, "low": 0.39}}, "0.4")
    assert (failed.returncode, failed.stdout) == (
        1,
        "gate raters: raters agree too little: alpha may be as low as 0.39\n",
    )


@pytest.mark.parametrize("says", ["applies", "in doubt", "too few to say"])
def test_what_is_in_doubt_goes_to_people_and_the_model_stays(says: str):
    passed = gate("drift", {"figures": {"verdict": {"reward_model": says}}})
    assert (passed.returncode, passed.stdout) == (0, f"reward model: {says}\ngate drift: passed\n")


def test_a_reward_model_that_does_not_apply_ends_the_run():
    failed = gate("drift", {"figures": {"verdict": {"reward_model": "does not apply"}}})
    assert failed.returncode == 1
    assert failed.stdout.splitlines()[-1] == "gate drift: the reward model does not apply"


@pytest.mark.exhaustive
def test_the_support_blueprint_runs_from_an_empty_folder(tmp_path: Path):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    found = subprocess.run(
        ["sh", str(SUPPORT / "run.sh"), str(tmp_path / "support")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    evaluation = json.loads((tmp_path / "support" / "evaluation.json").read_text())
    assert evaluation["figures"]["gate"]["passed"]
