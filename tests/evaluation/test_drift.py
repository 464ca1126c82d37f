"""`keel drift`: what moved is found, what did not is not, and few answers are called few."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keel.cli.main import main
from keel.config import DriftConfig, parse
from keel.data.items import read_unranked_responses
from keel.errors import ConfigError, DataError
from keel.evaluation.drift.drift import drift
from keel.evaluation.drift.verdict import (
    comparable_metrics,
    compare_metrics,
    correct_p_values,
    describe_shifts,
    explain_too_few,
    is_alarming,
    mark_unlikely,
    model_verdict,
)

from ..runs import settings as run_settings

Table = dict[str, Any]


def normal(rows: int, seed: int, **shift: float) -> Table:
    """Figures of so many answers; those named are shifted by so many standard deviations."""
    random = np.random.default_rng(seed)
    names = ("score", "disagreement/model", "kl", "prompt_novelty")
    return {name: random.normal(size=rows) + shift.get(name.partition("/")[0], 0.0) for name in names}


def said(training: Table, today: Table) -> dict[str, dict[str, Any]]:
    return correct_p_values({"all": compare_metrics(training, today, seed=0)})["all"]


# ---- the tests -------------------------------------------------------------------------------------------------------


def test_the_same_kind_of_answers_is_called_the_same():
    found = said(normal(300, 0), normal(300, 1))
    assert {each["says"] for each in found.values()} == {"same"}
    assert model_verdict(found) == "applies"
    assert describe_shifts(found) == []


def test_a_moved_figure_is_named_with_both_values():
    found = said(normal(300, 0), normal(250, 1, kl=1.0))
    assert found["kl"]["says"] == "moved"
    assert found["kl"]["low"] < 1.0 < found["kl"]["high"]
    assert found["score"]["says"] == "same"
    assert model_verdict(found) == "applies"  # a KL says nothing of the reward model
    assert describe_shifts(found)[0].startswith("kl: ")


def test_a_score_that_moved_leaves_the_reward_model_in_doubt():
    assert model_verdict(said(normal(300, 0), normal(300, 1, score=-1.0))) == "in doubt"
    assert model_verdict(said(normal(300, 0), normal(300, 1, score=1.0))) == "in doubt"


def test_members_that_disagree_more_say_that_it_does_not_apply_and_less_that_it_does():
    assert model_verdict(said(normal(300, 0), normal(300, 1, disagreement=1.0))) == "does not apply"
    assert model_verdict(said(normal(300, 0), normal(300, 1, disagreement=-1.0))) == "applies"


def test_few_answers_are_too_few_to_say():
    found = said(normal(300, 0), normal(12, 1))
    assert {each["says"] for each in found.values()} == {"too few to say"}
    assert model_verdict(found) == "too few to say"
    assert explain_too_few(found)[0].startswith("it takes about ")


def test_the_number_of_answers_that_is_named_is_the_least_that_will_do():
    found = said(
        {"score": np.zeros(300), "outside_range/m": np.zeros(300)},
        {"score": np.zeros(9), "outside_range/m": np.zeros(9)},
    )
    takes = found["outside_range/m"]["takes"]
    for rows, verdict in ((takes, "same"), (takes - 1, "too few to say")):
        table = {"score": np.zeros(max(rows, 300)), "outside_range/m": np.zeros(max(rows, 300))}
        again = said(table, {name: values[:rows] for name, values in table.items()})
        assert again["outside_range/m"]["says"] == verdict


def test_of_figures_with_too_few_answers_the_one_that_takes_most_is_named():
    few = {"says": "too few to say", "today": 0.0, "training": 0.0}
    found = {"score": few | {"takes": 160}, "outside_range/m": few | {"takes": 611}, "kl": few | {"takes": 9_999}}
    assert explain_too_few(found) == [
        "it takes about 620 responses on each side to show a move of 0.05 in outside_range/m (also too few for score)"
    ]
    assert "no number of responses" in explain_too_few({"score": few | {"takes": None}})[0]
    assert explain_too_few({}) == ["neither scores nor prompts were measured"]


def test_many_tests_need_more_answers_to_say_the_same():
    """300 and 200 rows tell a distance of 0.162 in one test, of 0.199 in twelve and of 0.2 in thirteen."""
    groups = {f"slice {i}": compare_metrics(normal(300, 2 * i), normal(200, 2 * i + 1), seed=i) for i in range(4)}
    assert {each["says"] for each in correct_p_values({"one": groups["slice 0"]})["one"].values()} == {"same"}
    found = correct_p_values(groups)  # sixteen
    assert "same" not in {each["says"] for own in found.values() for each in own.values()}
    assert model_verdict(found["slice 0"]) == "too few to say"


def test_a_rare_yes_of_few_answers_is_not_called_the_same():
    """None of 60 and none of 40: a share of one in twenty would be missed as often as not."""
    found = said({"truncated": np.zeros(60)}, {"truncated": np.zeros(40)})
    assert found["truncated"]["says"] == "too few to say"
    many = said({"truncated": np.zeros(600)}, {"truncated": np.zeros(300)})
    assert many["truncated"]["says"] == "same"


def test_of_many_reasons_three_are_told_and_the_judge_comes_first():
    moved = {"training": 0.5, "today": 1.0, "p": 1e-5, "says": "moved"}
    names = ("length", "prompt_novelty", "score", "disagreement/model")
    found = {name: moved | {"distance": 0.9 - at / 10} for at, name in enumerate(names)}
    found["outside_range/model"] = moved | {"distance": 1.0, "today": 0.0}  # fewer: no reason against the judge
    assert [reason.partition(":")[0] for reason in describe_shifts(found)] == [
        "disagreement/model", "prompt_novelty", "score", "and 2 more"
    ]  # fmt: skip


def test_a_small_move_of_many_answers_is_a_little():
    found = said(normal(1_000, 0), normal(1_000, 1, score=0.3))
    assert found["score"]["says"] == "moved a little"
    assert model_verdict(found) == "applies"


def test_scores_out_of_range_count_from_one_in_twenty():
    inside, some = np.zeros(300), (np.arange(300) % 12 == 0).astype(float)
    base = {"score": np.zeros(300)}
    found = said(base | {"outside_range/model": inside}, base | {"outside_range/model": some})
    assert found["outside_range/model"]["says"] == "moved"
    assert model_verdict(found) == "does not apply"
    few = (np.arange(300) % 34 == 0).astype(float)
    assert model_verdict(said(base | {"outside_range/model": inside}, base | {"outside_range/model": few})) == "applies"


def test_prompts_that_became_more_usual_are_no_alarm():
    moved = {"training": 0.5, "today": 0.1, "says": "moved"}
    assert not is_alarming("prompt_novelty", moved)
    assert is_alarming("prompt_novelty", {"training": 0.1, "today": 0.5, "says": "moved"})


def test_many_tests_raise_no_more_false_alarms_than_one():
    """Twenty slices of figures that never moved: all p-values together are corrected."""
    groups = {f"slice {i}": compare_metrics(normal(60, 2 * i), normal(60, 2 * i + 1), seed=i) for i in range(20)}
    assert sum(moved.p < 0.05 for found in groups.values() for moved in found.values()) > 0
    assert all(each["p"] > 0.05 for found in correct_p_values(groups).values() for each in found.values())


@pytest.mark.exhaustive
def test_one_family_in_twenty_has_a_false_alarm():
    alarmed = 0
    for trial in range(100):
        groups = {"all": compare_metrics(normal(100, 3 * trial), normal(50, 3 * trial + 1), seed=trial)}
        alarmed += any(each["p"] <= 0.05 for each in correct_p_values(groups)["all"].values())
    assert alarmed <= 11


def test_unlikely_prompts_are_those_beyond_ninety_nine_of_a_hundred():
    training = np.arange(100.0)
    assert mark_unlikely(training, training).sum() == 1
    assert mark_unlikely(np.array([-5.0, 50.0]), training).tolist() == [1.0, 0.0]
    assert np.isnan(mark_unlikely(np.array([math.nan]), training)).all()


def test_kinds_that_the_training_did_not_tell_apart_are_asked_for_novelty_only():
    assert set(comparable_metrics(normal(3, 0))) == {"disagreement/model", "prompt_novelty"}


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned from prompts of two kinds by a reward model with a range."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("drift")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_policy, num_labels=1)
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(-1, 1, 32).unsqueeze(0))
    model.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(folder / "reward")
    ends = {"score_lowest": -1e3, "score_highest": 1e3}
    known = dict.fromkeys(("score_low", "score_median", "score_high", "score_std", "longest"), 0.0)
    (folder / "reward" / "range.json").write_text(json.dumps(ends | known))
    rows = [
        {"prompt": f"w{i} w{j} w{k}", "kind": "a" if i < 3 else "b"} for i in range(6) for j in range(7) for k in (1, 2)
    ]
    write(folder / "training.jsonl", rows)
    values = run_settings(tiny_policy, folder / "run", {"prompts": {"path": str(folder / "training.jsonl")}})
    values |= {"rewards": [{"model": str(folder / "reward")}], "steps": 1}
    (folder / "run.yaml").write_text(json.dumps(values))
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(world: Path, **more: Any) -> DriftConfig:
    return parse(DriftConfig, {"run": str(world / "run"), **more})


def test_prompts_of_the_training_have_not_drifted(world: Path, tmp_path: Path):
    output = tmp_path / "drift.json"
    config = asked(world, prompts={"path": str(world / "training.jsonl")}, slices=["kind"], output=str(output))
    figures = drift(config)
    assert figures["rows"] == {"training": 84, "today": 84}
    wanted = {"score", "kl", "length", "truncated", "reference_logprob", "entropy", "prompt_logprob", "prompt_novelty"}
    assert set(figures["figures"]) == wanted | {"prompt_unlikely", "outside_range/reward"}
    assert not any(each["says"].startswith("moved") for each in figures["figures"].values())
    assert {name: own["rows"] for name, own in figures["slices"].items()} == {"kind=a": 42, "kind=b": 42}
    assert figures["verdict"]["moved_slices"] == []
    assert not (tmp_path / "drift.rank.jsonl").exists()
    record = json.loads(output.read_text())
    assert len(record["answers"]) == 84
    assert record["figures"]["verdict"] == figures["verdict"]


def test_a_new_kind_of_prompts_is_found_and_its_answers_are_laid_out_to_rank(world: Path, tmp_path: Path):
    old = [json.loads(line) for line in (world / "training.jsonl").read_text().splitlines()]
    new = [{"prompt": f"w2{i % 8} w1{j} w2{i % 8} w1{i}", "kind": "c"} for i in range(8) for j in range(10)]
    path, output = write(tmp_path / "today.jsonl", old + new), tmp_path / "drift.json"
    figures = drift(asked(world, prompts={"path": path}, slices=["kind"], output=str(output)))
    verdict = figures["verdict"]
    assert figures["slices"]["kind=c"]["of_training"] == 0
    assert figures["slices"]["kind=c"]["figures"]["prompt_novelty"]["today"] == 1.0
    assert verdict["moved_slices"] == ["kind=c"]
    assert verdict["because"]["kind=c"][0] == "none of the training prompts is of this kind"
    rows = [json.loads(line) for line in (tmp_path / "drift.rank.jsonl").read_text().splitlines()]
    assert figures["to_rank"]["rows"] == len(rows) > 60
    assert {row["kind"] for row in rows} == {"c"}
    assert all(2 <= len(set(row["responses"])) == len(row["responses"]) <= 4 for row in rows)
    items = read_unranked_responses(str(tmp_path / "drift.rank.jsonl"))  # as keel rank reads them
    assert [(item.prompt, list(item.responses)) for item in items] == [
        (row["prompt"], row["responses"]) for row in rows
    ]


def test_scores_beyond_the_range_of_the_reward_model_are_seen(world: Path, tmp_path: Path):
    folder = shutil.copytree(world, tmp_path / "copy")
    narrow = json.loads((folder / "reward" / "range.json").read_text()) | {"score_lowest": 0.0, "score_highest": 1e-9}
    (folder / "reward" / "range.json").write_text(json.dumps(narrow))
    text = (folder / "run" / "config.yaml").read_text().replace(str(world), str(folder))
    (folder / "run" / "config.yaml").write_text(text)
    figures = drift(asked(folder, prompts={"path": str(world / "training.jsonl")}))
    assert figures["figures"]["outside_range/reward"]["today"] == 1.0


def test_logged_answers_have_the_figures_that_they_had_when_they_were_sampled(world: Path, tmp_path: Path):
    output = tmp_path / "sampled.json"
    drift(asked(world, prompts={"path": str(world / "training.jsonl")}, output=str(output)))
    answers = json.loads(output.read_text())["answers"]
    rows = [
        {**row, "truncated": bool(row["truncated"])}
        for row in answers
        if len(row["response"].split()) + (not row["truncated"]) == row["length"]
    ]  # special tokens are no text
    assert len(rows) > 20
    logged = drift(asked(world, answers=write(tmp_path / "logged.jsonl", rows)))
    for name, own in logged["figures"].items():
        assert own["today"] == pytest.approx(sum(row[name] for row in rows) / len(rows), abs=1e-4), name
    without = [{name: row[name] for name in ("prompt", "response")} for row in rows]
    notes = drift(asked(world, answers=write(tmp_path / "plain.jsonl", without)))["notes"]
    assert notes == ["truncated is left out: the logged rows have no column of that name"]


def test_prompts_of_the_log_stand_for_a_file_that_is_gone(world: Path, tmp_path: Path):
    folder = shutil.copytree(world, tmp_path / "copy")
    text = (folder / "run" / "config.yaml").read_text().replace("training.jsonl", "gone.jsonl")
    (folder / "run" / "config.yaml").write_text(text)
    figures = drift(asked(folder, prompts={"path": str(world / "training.jsonl")}))
    assert 0 < figures["rows"]["training"] <= 16
    assert "the training prompts are read from the run's log" in figures["notes"][0]
    (folder / "run" / "rollouts.jsonl").unlink()
    with pytest.raises(DataError, match="neither the training prompts nor the run's log can be read"):
        drift(asked(folder, prompts={"path": str(world / "training.jsonl")}))


def test_a_file_that_has_changed_since_the_run_is_told(world: Path, tmp_path: Path):
    rows = (world / "training.jsonl").read_text()
    try:
        (world / "training.jsonl").write_text(rows + json.dumps({"prompt": "w9", "kind": "a"}) + "\n")
        notes = drift(asked(world, prompts={"path": write(tmp_path / "few.jsonl", [{"prompt": "w1"}])}))["notes"]
    finally:
        (world / "training.jsonl").write_text(rows)
    assert notes == [f"{world}/training.jsonl has changed since the run began"]


def test_mistakes_are_told_before_anything_is_answered(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts = {"path": str(world / "training.jsonl")}
    with pytest.raises(ConfigError, match="no prompt has a column 'kid'; did you mean kind"):
        drift(asked(world, prompts=prompts, slices=["kid"]))
    with pytest.raises(DataError, match='a row has no text in "response"'):
        drift(asked(world, answers=str(world / "training.jsonl")))
    with pytest.raises(ConfigError, match="this folder holds no run"):
        drift(parse(DriftConfig, {"run": str(tmp_path), "prompts": prompts}))
    with pytest.raises(ConfigError, match=r"give either prompts\.path or answers"):
        asked(world)
    assert "drift" not in capsys.readouterr().err


def test_a_column_that_the_training_lacks_is_not_taken_for_a_new_kind_of_prompts(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    new = [{"prompt": f"w2{i % 8} w1{j} w2{i}", "kind": "a", "who": "x"} for i in range(8) for j in range(10)]
    command = ["drift", str(world / "run"), "--prompts.path", write(tmp_path / "new.jsonl", new)]
    assert main([*command, "--slices", "kind", "--slices", "who", "--output", str(tmp_path / "d.json")]) == 0
    shown = capsys.readouterr().out
    assert "who=x: 80 today, the training prompts have no column who" in shown
    assert "kind=a: 80 today, 42 in the training" in shown
    figures = json.loads((tmp_path / "d.json").read_text())["figures"]
    assert figures["slices"]["who=x"]["of_training"] is None
    assert "share_of_prompts" not in figures["slices"]["who=x"]["figures"]
    assert "none of the training prompts is of this kind" not in figures["verdict"]["because"]["who=x"]


def test_of_an_unfinished_run_the_policy_that_answers_is_named(world: Path, tmp_path: Path):
    folder = shutil.copytree(world, tmp_path / "copy")
    checkpoint = folder / "run" / "checkpoints" / "step-000001"
    assert checkpoint.is_dir()
    if not (checkpoint / "policy").is_dir():
        shutil.copytree(folder / "run" / "policy", checkpoint / "policy")
    shutil.rmtree(folder / "run" / "policy")
    notes = drift(asked(folder, prompts={"path": str(world / "training.jsonl")}, max_prompts=3))["notes"]
    assert notes == ["the run is not finished: the policy of step 1 of 1 is used"]


def test_an_output_that_cannot_be_written_is_told_before_anything_is_answered(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    for output, says in ((tmp_path, "this is a folder"), (tmp_path / "file" / "d.json", "cannot write here")):
        with pytest.raises(ConfigError, match=says):
            drift(asked(world, prompts={"path": str(world / "training.jsonl")}, output=str(output)))
    assert "drift" not in capsys.readouterr().err


def test_a_person_reads_a_verdict(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    new = [{"prompt": f"w2{i % 8} w1{j} w2{i}", "kind": "[/c]"} for i in range(8) for j in range(10)]
    command = ["drift", str(world / "run"), "--prompts.path", write(tmp_path / "new.jsonl", new), "--slices", "kind"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "verdict: in doubt" in shown
    assert "in doubt: kind=[/c]" in shown
    assert "--output FILE writes the responses to rank" in shown
    assert main([*command, "--output", str(tmp_path / "d.json"), "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["verdict"]["reward_model"] == "in doubt"
