"""KTO: labelled responses, the reference point and the loss, with numbers worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import keel
from keel.config import DpoConfig, parse
from keel.core.preferences import kto_loss
from keel.data.labels import LabelledResponse, labels_of_ranking, load_labels
from keel.data.notes import Notes
from keel.data.preferences import Ranking
from keel.data.turns import Example
from keel.errors import ConfigError, DataError
from keel.supervised.kto import KtoSide, balance_remarks, label_losses, mismatch

from ..runs import lines

LABELS = [
    {"prompt": f"w{number}", "completion": " w3" if number % 2 else " w4", "label": bool(number % 2)}
    for number in range(5, 21)
]


def settings(**given: Any) -> DpoConfig:
    return parse(DpoConfig, {"output": "run", "model": "model", "data": {"path": "rows.jsonl"}, "loss": "kto", **given})


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(
    model: Path, folder: Path, rows: list[dict[str, Any]] | None = None, resume: bool = False, **changes: Any
) -> dict[str, float]:
    values = {
        "output": str(folder),
        "model": str(model),
        "data": {"path": write(folder.parent / f"{folder.name}.jsonl", rows or LABELS), "eval_fraction": 0.25},
        "loss": "kto",
        "batch_size": 4,
        "epochs": 6,
        "optim": {"learning_rate": 3e-3},
        **changes,
    }
    return dict(keel.dpo(values, resume=resume).metrics)


def test_loss_by_hand() -> None:
    """sigma(0.25) and sigma(1.25) by a table of the logistic function. z = 0.25 and r = 0, 1.5, 0, 1.5."""
    rewards = torch.tensor([0.0, 1.5, 0.0, 1.5], dtype=torch.float64)
    desirable = torch.tensor([True, True, False, False])
    losses = kto_loss(rewards, desirable, torch.tensor(0.25, dtype=torch.float64))
    assert losses.tolist() == pytest.approx([0.5621765009, 0.2227001388, 0.4378234991, 0.7772998612])


def test_gradient_pulls_only_through_the_responses() -> None:
    """The slope of sigma at 0 is a quarter; the loss of a desirable response falls as its reward rises."""
    rewards = torch.tensor([1.0, 1.0], requires_grad=True)
    kto_loss(rewards, torch.tensor([True, False]), torch.tensor(1.0)).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == pytest.approx([-0.25, 0.25])


def test_weights_of_kinds_and_of_rows() -> None:
    """Log-ratios 2 and -2 with beta 0.5, KL 1: 1 - sigma(1 - 0.5) = 0.3775407 and 1 - sigma(0.5 + 1) = 0.1824255."""
    labels = [LabelledResponse("a", "x", True, weight=2.0), LabelledResponse("b", "y", False)]
    side = KtoSide(labels, [], [], ref_logprobs=torch.tensor([-4.0, -4.0], dtype=torch.float64))
    config = settings(beta=0.5, desirable_weight=3.0, undesirable_weight=0.5)
    losses = label_losses(torch.tensor([-2.0, -6.0], dtype=torch.float64), side, [0, 1], 1.0, config)
    assert losses.tolist() == pytest.approx([6 * 0.3775406688, 0.5 * 0.1824255238])


def test_each_prompt_gets_the_response_to_the_next_other_prompt() -> None:
    labels = [LabelledResponse(prompt, "", True) for prompt in "aabca"]
    prompts = (1, 1, 2, 3, 1)
    examples = [Example("aabca"[row], (prompts[row], 10 + row, 20 + row), 1) for row in range(5)]
    found = [example.tokens for example in mismatch(labels, examples, limit=3)]
    # Rows 0 and 1 (a) take that of row 2 (b), 2 that of 3 (c), 3 that of 4 (a); 4 (a) continues at the first row that
    # is not a, which is row 2.
    assert found == [(1, 12, 22), (1, 12, 22), (2, 13, 23), (3, 14, 24), (1, 12, 22)]
    assert mismatch(labels, examples, limit=2)[0].tokens == (1, 12)  # what is too long loses its end
    assert [e.tokens for e in mismatch(labels[:2], examples[:2], 3)] == [(1, 10, 20), (1, 11, 21)]  # no other prompt


def test_rankings_as_labels() -> None:
    def label(ranks: tuple[int | None, ...]) -> list[tuple[str, bool]]:
        found = labels_of_ranking(Ranking("p", tuple("abcd"[: len(ranks)]), ranks, weight=2.0))
        assert all(each.weight == 2.0 for each in found)
        return [(each.response, each.is_desirable) for each in found]

    assert label((2, 1)) == [("a", False), ("b", True)]
    assert label((1, 1)) == []
    assert label((1, 2, 3)) == [("a", True), ("c", False)]  # b is better than one and worse than one
    assert label((1, 2, 3, 4)) == [("a", True), ("b", True), ("c", False), ("d", False)]
    assert label((1, 2, 2, None)) == [("a", True), ("b", False), ("c", False)]


def test_rows_of_labels_and_of_rankings_are_read_together(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "c"}
    rows = [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "q", "response": "b", "label": False, "weight": 0.5},
        {"prompt": [{"role": "user", "content": "r"}], "completion": [said], "label": True},
        {"prompt": "s", "chosen": "d", "rejected": "e"},
        {"prompt": "t", "responses": ["f", "g", "h"], "ranks": [1, 2, 3]},
    ]
    notes = Notes()
    labels, left_out = load_labels(write(tmp_path / "rows.jsonl", rows), notes=notes)
    assert [(each.response, each.is_desirable) for each in labels] == (
        [("a", True), ("b", False), ("c", True), ("d", True), ("e", False), ("f", True), ("h", False)]
    )
    assert labels[1].weight == 0.5
    assert left_out == 1
    assert "better than as many others as it is worse than" in "".join(notes.lines())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completion": "a"}, r'rows.jsonl:1: needs "label": true for a desirable response'),
        ({"prompt": "p", "completion": "a", "label": 1}, 'needs "label": true'),
        ({"prompt": "p", "label": True}, '"completion"'),
        ({"completion": "a", "label": True}, '"prompt"'),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_labels(write(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "sigmoid", "desirable_weight": 2.0}, "need loss: kto; remove them for sigmoid"),
        ({"ties": "half"}, "ties needs a loss that compares responses; remove it for kto"),
        ({"nll_coef": 0.1}, "nll_coef needs a loss that compares"),
        ({"length_normalized": True}, "length_normalized needs a loss that compares"),
        ({"label_smoothing": 0.1}, "label_smoothing needs loss: sigmoid or simpo"),
    ],
)
def test_settings_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**given)


def test_labels_of_one_kind_are_refused(tiny_policy: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": True} for row in LABELS]
    with pytest.raises(DataError, match="no training row is undesirable"):
        train(tiny_policy, tmp_path / "run", rows)


def test_an_imbalance_is_reported() -> None:
    labels = [LabelledResponse("a", "x", True)] * 9 + [LabelledResponse("b", "y", False)] * 3
    assert "3 times the weight" in balance_remarks(labels, settings())[0]
    assert balance_remarks(labels, settings(undesirable_weight=2.5)) == []


def test_it_learns_what_is_desirable(tiny_policy: Path, tmp_path: Path) -> None:
    metrics = train(tiny_policy, tmp_path / "run")
    assert metrics["accuracy"] == 1.0
    assert metrics["chosen_reward"] > 0.05
    assert metrics["rejected_reward"] < -0.05
    assert metrics["margin"] == pytest.approx(metrics["chosen_reward"] - metrics["rejected_reward"])
    assert metrics["desirable_share"] == pytest.approx(sum(row["label"] for row in LABELS) / 16, abs=0.2)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["dpo/eval_loss"] == pytest.approx(0.5)  # sigma(0): nothing has changed yet
    assert rows[0]["dpo/eval_kl"] == 0.0
    assert rows[1]["dpo/kl"] == 0.0
    assert all(row["dpo/kl"] >= 0 for row in rows[1:])
    assert any(row["dpo/kl"] > 0 for row in rows[1:])


def test_micro_batches_do_not_change_the_step(tiny_policy: Path, tmp_path: Path) -> None:
    """The reference point is that of the full step, so it is the same however the step is cut."""
    found = []
    for name, tokens in (("one", 16_384), ("many", 6)):
        train(tiny_policy, tmp_path / name, microbatch_tokens=tokens, optim={"learning_rate": 3e-3, "eps": 1e-3})
        found.append([(row["dpo/loss"], row["dpo/kl"]) for row in lines(tmp_path / name / "metrics.jsonl")[1:]])
    for one, many in zip(*found, strict=True):
        assert many == pytest.approx(one, abs=1e-5)


def test_the_reference_point_is_that_of_the_mismatched_pairs_of_the_step(tiny_policy: Path, tmp_path: Path) -> None:
    """Measured again with transformers alone, after one step: the mean log-ratio over the rows of the second."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = {5: "w2", 6: "w9", 7: "w9", 8: "w9"}
    rows = [{"prompt": f"w{n}", "completion": f" {word}", "label": word == "w9"} for n, word in words.items()]
    common: dict[str, Any] = {"data": {"path": write(tmp_path / "rows.jsonl", rows), "eval_fraction": 0}}
    common |= {"batch_size": 4, "optim": {"learning_rate": 0.02, "schedule": "constant"}}
    train(tiny_policy, tmp_path / "one", epochs=1, **common)
    train(tiny_policy, tmp_path / "two", epochs=2, **common)
    start, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_policy, tmp_path / "one" / "policy"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    ratios = []
    for n, other in ((5, 6), (6, 7), (7, 8), (8, 5)):  # all four rows are in each step
        ids = tokenizer(f"w{n} {words[other]} </s>", return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            tables = [model(ids).logits.log_softmax(-1)[0, :-1] for model in (after, start)]
        new, old = (table.gather(1, ids[0, 1:, None]).sum() for table in tables)
        ratios.append(float(new - old))
    expected = max(0.0, sum(ratios) / 4)
    assert expected > 0.01
    assert lines(tmp_path / "two" / "metrics.jsonl")[2]["dpo/kl"] == pytest.approx(expected, rel=1e-3)


def test_a_resumed_run_is_the_straight_run(tiny_policy: Path, tmp_path: Path) -> None:
    """Killed in the middle, with a checkpoint before that."""
    data = {"path": write(tmp_path / "rows.jsonl", LABELS), "eval_fraction": 0.25}
    common: dict[str, Any] = {"data": data, "checkpoint": {"every": 2, "keep": 0}}
    train(tiny_policy, tmp_path / "straight", **common)
    resumed = tmp_path / "resumed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEEL_FAILPOINT", "update.optimizer:6=raise:EIO")
        with pytest.raises(OSError, match="Input/output"):
            train(tiny_policy, resumed, **common)
    train(tiny_policy, resumed, resume=True, **common)
    weights = [(tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in ("straight", "resumed")]
    assert weights[0] == weights[1]
