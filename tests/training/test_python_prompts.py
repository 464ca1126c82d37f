"""Prompts handed over in Python are checked as those of a file are."""

from pathlib import Path
from typing import Any

import pytest

import keel
from keel.data.python_rows import rows_from_python
from keel.errors import ConfigError, DataError
from keel.training.python_prompts import PYTHON_PROMPTS

from ..runs import lines, settings

ROWS = [{"prompt": f"w{number}", "answer": f"w{number + 1}", "facts": {"n": [number]}} for number in range(1, 5)]


def run(model: Path, output: Path, given: Any, **changes: Any) -> list[dict[str, Any]]:
    """The calls of the reward function in a run of one step without `prompts.path`."""
    calls: list[dict[str, Any]] = []

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append({"prompts": prompts, **columns})
        return [0.0 for _ in completions]

    values = settings(model, output, {"steps": 1, "rollout.batch_size": 4, **changes})
    if "prompts" not in changes:
        values.pop("prompts")
    keel.train(values, scorers=[score], prompts=given)
    return calls


def test_rows_bring_their_columns(tiny_policy: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    for name, prompts in (("list", ROWS), ("tuple", tuple(ROWS)), ("Dataset", Dataset.from_list(ROWS))):
        last = run(tiny_policy, tmp_path / name, prompts)[-1]
        assert sorted(last["prompts"]) == ["w1", "w2", "w3", "w4"]
        pairs = zip(last["prompts"], last["answer"], last["facts"], strict=True)
        assert sorted(pairs, key=str) == sorted(((r["prompt"], r["answer"], r["facts"]) for r in ROWS), key=str)
        assert {row["prompt"] for row in lines(tmp_path / name / "rollouts.jsonl")} <= {"w1", "w2", "w3", "w4"}


def test_other_iterables_are_read_to_their_end(tiny_policy: Path, tmp_path: Path) -> None:
    from datasets import Dataset, IterableDataset

    given = {
        "generator": (row for row in ROWS),
        "IterableDataset": IterableDataset.from_generator(lambda: iter(ROWS)),
        "map": Dataset.from_list(ROWS).map(lambda row: row),
    }
    for name, prompts in given.items():
        last = run(tiny_policy, tmp_path / name, prompts)[-1]
        assert sorted(last["prompts"]) == ["w1", "w2", "w3", "w4"]
        assert sorted(last["answer"]) == ["w2", "w3", "w4", "w5"]


def test_rows_for_supervised_verbs_may_come_from_any_iterable(tiny_policy: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    pairs = [{"prompt": f"w{n}", "chosen": " w3", "rejected": " w4"} for n in range(1, 7)]
    base = {"model": str(tiny_policy), "data": {"eval_fraction": 0.3}, "batch_size": 2}
    for name, data in (("Dataset", Dataset.from_list(pairs)), ("generator", (row for row in pairs))):
        for verb in (keel.reward, keel.dpo):
            result = verb({**base, "output": str(tmp_path / f"{verb.__name__}-{name}")}, data=data)
            assert 0 <= result.metrics["accuracy"] <= 1
            data = Dataset.from_list(pairs) if name == "Dataset" else iter(pairs)
    texts = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs)
    assert keel.sft({**base, "output": str(tmp_path / "sft")}, data=texts).metrics["loss"] > 0


def test_a_data_set_of_several_splits_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    with pytest.raises(ConfigError, match=r"choose a split, as in data\['train'\]"):
        run(tiny_policy, tmp_path / "run", DatasetDict({"train": Dataset.from_list(ROWS)}))


def test_texts_need_no_path(tiny_policy: Path, tmp_path: Path) -> None:
    assert set(run(tiny_policy, tmp_path / "run", ["w1", "w2"])[-1]["prompts"]) == {"w1", "w2"}
    assert f"path: {PYTHON_PROMPTS}" in (tmp_path / "run" / "config.yaml").read_text()


class DataFrame:
    """As pandas has it: its items are the names of its columns."""

    columns = ("prompt", "answer")

    def __iter__(self) -> Any:
        return iter(self.columns)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, name: str) -> list[str]:
        return ["w1"] * 4


@pytest.mark.parametrize(
    "prompts",
    [DataFrame(), "prompts.jsonl", b"prompts", Path("prompts.jsonl"), {"prompt": ["w1"]}, {"w1"}, 3, [], iter(())],
    ids=["DataFrame", "path as text", "bytes", "Path", "columns", "set", "number", "empty list", "empty iterator"],
)
def test_anything_else_is_refused(tiny_policy: Path, tmp_path: Path, prompts: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tiny_policy, tmp_path / "run", prompts)
    assert caught.value.where == "prompts"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"question": "w2"}, "no column"),
        ({"prompt": None}, "null"),
        ({"prompt": "  "}, "is empty"),
        ("", "is empty"),
        (None, "NoneType"),
        (7, "int"),
        ({"role": "user", "content": "w1"}, "no column"),
        ([{"role": "user"}], "message 1"),
        ("w1 \ud800", "Unicode"),
        ({"prompt": "w1", 3: "w2"}, "3"),
        ({"prompt": "w1", "answers": (x for x in "ab")}, "answers"),
        ({"prompt": "w1", "table": {(1, 2): "w2"}}, "table"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tiny_policy: Path, tmp_path: Path, row: Any, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        run(tiny_policy, tmp_path / "run", ["w1", row])
    assert caught.value.where == f"{PYTHON_PROMPTS}:2"


def test_rows_are_copies() -> None:
    facts = {"n": [1]}
    [row] = rows_from_python([{"prompt": "w1", "facts": facts}], "prompts", "prompt", "prompt")
    facts["n"].append(2)
    assert row.values["facts"] == {"n": [1]}


def test_the_rules_for_length_hold(tiny_policy: Path, tmp_path: Path) -> None:
    long = ["w1 w2 w3 w4 w5", "w6"]
    for rule, left in (("drop", {"w6"}), ("truncate", {"w6", "w4 w5"})):
        values = {"prompts": {"max_tokens": 2, "too_long": rule}}
        calls: list[str] = []

        def score(prompts: list[str], calls: list[str] = calls, **_: Any) -> list[float]:
            calls += prompts
            return [0.0 for _ in prompts]

        keel.train(settings(tiny_policy, tmp_path / rule, {"steps": 1, **values}), scorers=[score], prompts=long)
        assert set(calls) == left
    with pytest.raises(DataError, match="more than 2 tokens"):
        run(tiny_policy, tmp_path / "error", long, prompts={"max_tokens": 2})


def test_another_column(tiny_policy: Path, tmp_path: Path) -> None:
    rows = rows_from_python([{"question": "w1", "prompt": "not this"}, "w2"], "prompts", "question", "question")
    assert [row.values["question"] for row in rows] == ["w1", "w2"]


def test_other_prompts_cannot_go_on_with_a_run(tiny_policy: Path, tmp_path: Path) -> None:
    def score(completions: list[str]) -> list[float]:
        return [0.0 for _ in completions]

    first = settings(tiny_policy, tmp_path / "run", {"steps": 1})
    keel.train(first, [score], ["w1", "w2"])
    more = first | {"steps": 2}
    with pytest.raises(ConfigError, match="has changed since the run began"):
        keel.train(more, [score], ["w1", "w3"], resume=True)
    keel.train(more, [score], ["w1", "w2"], resume=True)
