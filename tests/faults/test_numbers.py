"""F-18: a number that is not finite, or a gradient that jumps, never reaches weights, moments or a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keel.errors import Diverged
from keel.learn import update
from keel.learn.guard import Guard, find_fault

from ..runs import contents, lines, train
from .children import STAGES, committed, needs_fork, run, start, train_stage


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("place", ["update.loss", "update.gradient"])
@pytest.mark.parametrize("name", list(STAGES))
def test_f18_it_stops_before_the_update(name: str, place: str, tiny_policy: Path, tmp_path: Path) -> None:
    stage = STAGES[name](tiny_policy, tmp_path)
    visit = 20 if name == "train" else 3  # policy and critic, four optimizer steps: eight a step
    child = start(stage, failpoint=f"{place}:{visit}=nan")
    assert child.wait() == 3
    assert "not finite" in child.words.splitlines()[-1]
    assert committed(stage) == 2
    kept = lines(stage.output / "faults" / "step-000003" / "rows.jsonl")
    columns = {"train": "response", "reward": "responses", "dpo": "responses", "sft": "text"}
    assert len(kept) == (16 if name == "train" else 4)
    assert all(row["prompt"] and columns[name] in row for row in kept)
    assert all(bool(value.isfinite().all()) for value in weights(stage.output).values())


@pytest.mark.slow
@needs_fork
def test_f18_the_batch_is_kept(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    child = start(stage, failpoint="update.loss:12=nan")
    assert child.wait() == 3
    kept = next((stage.output / "faults").iterdir())
    assert str(kept) in child.words
    fault = json.loads((kept / "fault.json").read_text())
    assert fault == {"step": int(kept.name[5:]), "what": "the loss is not finite"}
    answers = lines(kept / "rows.jsonl")
    batch = load_file(kept / "batch.safetensors")
    assert len(answers) == len(batch["advantages"]) == 16
    assert all(len(answer["advantages"]) == answer["length"] for answer in answers)


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("name", list(STAGES))
def test_f18_a_skipped_update_leaves_no_trace(name: str, tiny_policy: Path, tmp_path: Path) -> None:
    """Not in moments either: the run with one optimizer step skipped at its end is the run without it."""
    stage = STAGES[name](tiny_policy, tmp_path)
    stage.values["optim"] = {**stage.values["optim"], "on_fault": "skip"}
    stage.values["checkpoint"] = {"every": 1, "keep": 0}
    if name == "train":
        stage.values["critic"] = {"sharing": "shared"}
        stage.values["algorithm"] = {**stage.values["algorithm"], "minibatch_size": 16}
    visit = 5 if name == "train" else 3  # with a shared critic two norms a step
    assert run(stage, failpoint=f"update.gradient:{visit}=nan") == 0
    saved = [contents(stage.output / "checkpoints" / f"step-{step:06d}") for step in (2, 3)]
    assert all(saved[0][each] == saved[1][each] for each in ("weights.safetensors", "optimizer.safetensors"))
    whole = stage.at(tmp_path / "whole")
    assert run(whole) == 0
    two = [contents(each.output / "checkpoints" / "step-000002") for each in (stage, whole)]
    assert two[0] == two[1]


@pytest.mark.slow
@needs_fork
def test_f18_skips_in_a_row_stop_the_run_and_are_counted_across_a_resume(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path, {"optim.on_fault": "skip", "optim.max_skips": 2})
    stage.values["algorithm"] = {**stage.values["algorithm"], "minibatch_size": 16}
    stage.values["checkpoint"] = {"every": 1}
    visits = [2 * step - 1 for step in (2, 3)]  # of the policy's gradient; every step also visits the critic's
    nans = ",".join(f"update.gradient:{visit}=nan" for visit in visits)
    assert run(stage, failpoint=f"{nans},step.update:4=kill9") == -9
    skipped = [line["update/skipped"] for line in lines(stage.output / "metrics.jsonl")]
    assert skipped == [0.0, 1.0, 1.0]
    child = start(stage, resume=True, failpoint="update.gradient:1=nan")
    assert child.wait() == 3
    assert "3 updates in a row were faulty" in child.words


@pytest.mark.slow
@needs_fork
def test_f18_a_huge_rate_ends_with_exit_code_3(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path, {"optim.learning_rate": 1e20, "checkpoint.every": 1})
    child = start(stage)
    assert child.wait() == 3
    assert "not finite" in child.words.splitlines()[-1]
    assert all(bool(value.isfinite().all()) for value in weights(stage.output).values())


def test_f18_the_first_update_may_be_skipped(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes no weight, which is no fault of the settings then."""
    changes = {"optim.on_fault": "skip", "algorithm.minibatch_size": 16}
    norm = update.gradient_norm
    calls = iter([True, True] + [False] * 100)
    monkeypatch.setattr(update, "gradient_norm", lambda model: norm(model) * (float("nan") if next(calls) else 1.0))
    assert [line["update/skipped"] for line in train(tiny_policy, tmp_path / "run", changes)] == [1.0, 0.0]


def of_one_word(completions: list[str], **_: Any) -> list[float]:
    return [10.0 * words.count("w3") / 6 for words in map(str.split, completions)]


@pytest.mark.parametrize(
    ("limit", "words"),
    [({"algorithm.max_kl": 1.0}, "the KL to the reference is"), ({"algorithm.min_entropy": 1.0}, "the entropy is")],
)
def test_f40_a_collapse_stops_before_the_next_update(
    limit: dict[str, float], words: str, tiny_policy: Path, tmp_path: Path
) -> None:
    """A policy that nothing holds learns to say one word."""
    free = {"steps": 60, "algorithm.kl_coef": 1e-6, "optim.learning_rate": 1e-2, "algorithm.update_epochs": 4}
    with pytest.raises(Diverged, match=words) as caught:
        train(tiny_policy, tmp_path / "run", {**free, **limit}, [of_one_word])
    assert caught.value.exit_code == 3
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert 1 <= len(found) < 60
    assert found[0]["objective/kl"] < 0.01
    assert all(line["objective/kl"] <= 1.0 for line in found) or "min_entropy" in str(limit)


def test_a_step_without_a_single_score_is_no_fault(tiny_policy: Path, tmp_path: Path) -> None:
    def failing(completions: list[str], asked: list[int] = []) -> list[float]:  # noqa: B006
        asked.append(1)
        if len(asked) == 4:  # after the self-check's three
            raise ValueError("not now")
        return [float(len(text)) for text in completions]

    changes = {"reward.on_failure": "drop"}
    found = train(tiny_policy, tmp_path / "run", changes, [failing])
    assert [line["reward/dropped"] for line in found] == [1.0, 0.0]
    assert [line["update/skipped"] for line in found] == [0.0, 0.0]


def weights(folder: Path) -> dict[str, Any]:
    """Every tensor of every file of weights in a folder."""
    return {
        f"{path}:{name}": value
        for path in folder.rglob("*.safetensors")
        if path.name != "batch.safetensors"
        for name, value in load_file(path).items()
    }


# ---- the guard itself ------------------------------------------------------------------------------------------------


def test_a_jump_counts_once_there_is_a_mean_to_jump_from() -> None:
    guard = Guard(on_fault="skip", spike=5.0)
    assert all(guard.admits({"policy": norm}) for norm in [1.0, 100.0, *[1.0] * 8])  # the mean of these ten is 10.9
    assert guard.admits({"policy": 54.0})
    assert guard.means["policy"] == pytest.approx((109.0 + 54.0) / 11)
    assert not guard.admits({"policy": 5.01 * (109.0 + 54.0) / 11})
    assert guard.means["policy"] == pytest.approx((109.0 + 54.0) / 11), "a jump is no part of the mean"
    assert guard.admits({"policy": 1.0, "critic": 1e6}), "the critic's first"


def test_skips_in_a_row_have_an_end() -> None:
    guard = Guard(on_fault="skip", max_skips=2)
    for fault, taken in ((None, True), ("bad", False), ("bad", False), (None, True), ("bad", False), ("bad", False)):
        assert guard.admits({"policy": 1.0}, fault) is taken
    with pytest.raises(Diverged, match="3 updates in a row were faulty, the last one: bad"):
        guard.admits({"policy": 1.0}, "bad")


def test_the_first_tensor_at_fault_is_named() -> None:
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.ones(1, 2), torch.tensor([float("inf")])
    assert find_fault(True, {"policy": float("inf")}, layer.named_parameters()) == "the gradient of bias is not finite"
    assert find_fault(False, {}, []) == "the loss is not finite"
    assert find_fault(True, {"policy": 1.0}, []) is None
