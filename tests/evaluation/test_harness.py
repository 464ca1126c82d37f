"""`keel evaluate --tasks`: the harness is called on the saved folder; without it, one line says what is missing."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from keel.cli.main import main
from keel.config import EvaluateConfig, parse
from keel.errors import ConfigError, EngineError
from keel.evaluation.evaluate import evaluate_policies
from keel.evaluation.harness import check_tasks, read_results

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="needs lm-evaluation-harness: pip install 'lm_eval[hf]'")
# What lm-evaluation-harness 0.4.13 returned for a task of 4 questions, and for one with two filters.
RESULTS: dict[str, dict[str, Any]] = {
    "choice": {"alias": "choice", "sample_len": 4, "acc,none": 0.75, "acc_stderr,none": 0.25},
    "maths": {
        "alias": "maths",
        "exact_match,strict-match": 0.5,
        "exact_match_stderr,strict-match": 0.1,
        "exact_match,flexible-extract": 0.6,
        "exact_match_stderr,flexible-extract": "N/A",
    },
}


def test_results_are_read_with_intervals() -> None:
    """0.75 +- 1.96 * 0.25 is 0.26 to 1.24."""
    read = read_results(RESULTS)
    assert read["choice"] == pytest.approx({"acc": 0.75, "acc_low": 0.26, "acc_high": 1.24}, abs=1e-4)
    assert list(read["maths"]) == [
        "exact_match/strict-match",
        "exact_match/strict-match_low",
        "exact_match/strict-match_high",
        "exact_match/flexible-extract",
    ]


@pytest.mark.skipif(INSTALLED, reason="lm-evaluation-harness is installed")
def test_without_the_harness_one_line_says_so(tiny_policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--policy", str(tiny_policy), "--tasks", "hellaswag"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "tasks need lm-evaluation-harness" in line
    assert "pip install 'lm_eval[hf]'" in line


def test_what_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"give prompts\.path, or tasks"):
        parse(EvaluateConfig, {"policy": "p"})
    with pytest.raises(ConfigError, match="tasks: only with policy"):
        parse(EvaluateConfig, {"checkpoints": "run", "tasks": ["hellaswag"]})
    config = parse(EvaluateConfig, {"policy": "http://host/v1#m", "tasks": ["hellaswag"]})
    with pytest.raises(ConfigError, match="tasks need a model folder, not an address"):
        check_tasks(config, {"policy": "http://host/v1#m"}, 1)
    with pytest.raises(ConfigError, match="start keel without torchrun"):
        check_tasks(config, {"policy": "folder"}, 2)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with the definition of one task of multiple choice, and its questions."""
    rows = [{"question": "w1 w2", "choices": ["w3", "w4"], "label": number % 2} for number in range(4)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    definition = {
        "task": "w_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "w_choice.yaml").write_text(json.dumps(definition))  # JSON is YAML
    return folder


@needs_harness
@pytest.mark.filterwarnings("default")  # those of the harness and its packages
def test_a_saved_policy_is_evaluated_on_a_task(tiny_policy: Path, tasks: Path, tmp_path: Path) -> None:
    """The choices are the same in each question, and each is right in half of them: the accuracy is one half."""
    values = {
        "policy": str(tiny_policy),
        "against": str(tiny_policy),
        "tasks": ["w_choice"],
        "harness": {"folder": str(tasks)},
        "output": str(tmp_path / "evaluation.json"),
    }
    metrics = evaluate_policies(parse(EvaluateConfig, values))
    assert metrics["tasks"]["policy"]["w_choice"]["acc"] == 0.5
    assert metrics["tasks"]["against"] == metrics["tasks"]["policy"]
    assert metrics["tasks"]["policy"]["w_choice"]["acc_low"] < 0.5
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["figures"] == metrics
    assert saved["answers"] == []


@needs_harness
@pytest.mark.filterwarnings("default")
def test_the_command_prints_tasks_beside_prompts(
    tiny_policy: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1"}\n{"prompt": "w2"}\n')
    command = ["evaluate", "--policy", str(tiny_policy), "--tasks", "w_choice", "--harness.folder", str(tasks)]
    assert main([*command, "--prompts.path", str(tmp_path / "prompts.jsonl"), "--harness.limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert "w_choice acc" in shown
    assert "2 prompts" in shown


@needs_harness
@pytest.mark.filterwarnings("default")
def test_mistakes_are_one_line(tiny_policy: Path, tasks: Path, tmp_path: Path) -> None:
    values = {"policy": str(tiny_policy), "harness": {"folder": str(tasks)}}
    with pytest.raises(ConfigError, match=r"no task is called 'w_choise' -> did you mean w_choice\?"):
        evaluate_policies(parse(EvaluateConfig, values | {"tasks": ["w_choise"]}))
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(EngineError, match="most tasks download their data"):
        evaluate_policies(parse(EvaluateConfig, values | {"tasks": ["w_choice"]}))
