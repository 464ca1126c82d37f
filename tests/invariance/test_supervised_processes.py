"""sft, reward and dpo: several processes train what one trains, and can resume the run of another number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ..runs import lines
from .processes import run, run_in_processes

pytestmark = pytest.mark.slow  # five more interpreters start

TEXTS = [  # in each batch of six, one process has a row as long as the five of the other
    {"prompt": f"w{i}", "completion": " ".join(f" w{(i * j) % 28}" for j in range(22 if i % 6 == 0 else 3))}
    for i in range(1, 19)
]
RANKINGS = [
    {"prompt": f"w{10 + i}", "responses": [f" w{i % 8}", f" w{i % 8} w9 w4", " w3 w1", "w2"], "ranks": [2, 1, 2, 3]}
    for i in range(9)
]
PAIRS = [{"prompt": f"w{i}", "chosen": f" w{i % 5} w9", "rejected": f" w{i % 7} w3 w4"} for i in range(9)]
LABELS = [{"prompt": f"w{i}", "completion": f" w{i % 5} w9", "label": i % 3 > 0} for i in range(12)]

CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "counts 1 and 5": ("sft", TEXTS, {"batch_size": 6, "microbatch_tokens": 5, "gradient_checkpointing": True}),
    "a process without a row": ("sft", TEXTS[:4], {"batch_size": 1}),
    "a loss that is not finite": ("sft", TEXTS[:8], {"batch_size": 4, "optim": {"on_fault": "skip"}}),
    "pairs": ("reward", PAIRS, {"calibrate": True, "microbatch_tokens": 40}),
    "lists": ("reward", RANKINGS, {"loss": "listwise", "patience": 2, "gradient_checkpointing": True}),
    "adapter": ("reward", PAIRS, {"lora": {"r": 2}, "gradient_checkpointing": True}),
    "ensemble": ("reward", PAIRS, {"members": 2, "epochs": 0.5}),
    "many passes": ("dpo", RANKINGS, {"microbatch_tokens": 12, "patience": 2, "batch_size": 2, "epochs": 1.5}),
    "labels": ("dpo", LABELS, {"loss": "kto", "microbatch_tokens": 12, "optim": {"eps": 1e-3}}),
}
IN_THREE = ["counts 1 and 5", "a process without a row", "pairs", "many passes"]
RESULTS = {"sft": "model", "reward": "model", "dpo": "policy"}


@pytest.fixture(scope="module")
def step_of(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")

    def step(case: str, run_name: str, **what: bool) -> dict[str, Any]:
        verb, rows, changes = CASES[case]
        data = folder / f"{case}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sections = {"optim": {"learning_rate": 1e-4, "schedule": "constant"}, "checkpoint": {"keep_final": True}}
        values = {
            "output": str(folder / f"{case}, {run_name}"),
            "model": str(tiny_policy),
            "data": {"path": str(data), "eval_fraction": 0.25, "watch_fraction": 0.3},
            "batch_size": 3,
            **changes,
            **{name: section | changes.get(name, {}) for name, section in sections.items()},
        }
        return {"verb": verb, "values": values, "nan": case == "a loss that is not finite", **what}

    return step


@pytest.fixture(scope="module")
def folders(step_of: Callable[..., dict[str, Any]]) -> Callable[[str, str], Path]:
    """Every run: in one process, in a pair and in three; interrupted ones are resumed in a pair and in one."""
    resumed = "many passes"
    run([step_of(case, "1") for case in CASES] + [step_of(resumed, "1 then 2", interrupt=True)])
    in_pair = [step_of(case, "2") for case in CASES]
    in_pair += [step_of(resumed, name, interrupt=True) for name in ("2 then 1", "2 then 2")]
    in_pair += [step_of(resumed, name, resume=True) for name in ("1 then 2", "2 then 2")]
    run_in_processes(2, in_pair)
    run_in_processes(3, [step_of(case, "3") for case in IN_THREE])
    run([step_of(resumed, "2 then 1", resume=True)])
    return lambda case, name: Path(step_of(case, name)["values"]["output"])


def require_same_run(one: Path, other: Path) -> None:
    """Metrics to 1e-4, relative; weights of all results to 1e-5."""
    logs = sorted(path.relative_to(one) for path in one.rglob("metrics.jsonl"))
    for log in logs:
        for ours, theirs in zip(lines(one / log), lines(other / log), strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                if not name.endswith("tokens_per_second"):
                    expected = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
                    assert theirs[name] == expected, (log, name)
    results = sorted(path.relative_to(one) for path in one.rglob("*model.safetensors"))
    assert logs
    assert results
    for result in results:
        expected, found = load_file(one / result), load_file(other / result)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize(("case", "processes"), [(case, "2") for case in CASES] + [(case, "3") for case in IN_THREE])
def test_several_processes_train_what_one_trains(
    case: str, processes: str, folders: Callable[[str, str], Path]
) -> None:
    one, several = folders(case, "1"), folders(case, processes)
    require_same_run(one, several)
    figures = [json.loads((folder / "figures.json").read_text()) for folder in (one, several)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4, abs=1e-5)
    result = RESULTS[CASES[case][0]]
    files = [
        sorted(str(path.relative_to(folder)) for path in (folder / result).rglob("*")) for folder in (one, several)
    ]
    assert files[0] == files[1]


def test_a_loss_that_is_not_finite_on_one_process_skips_the_step_on_all(folders: Callable[[str, str], Path]) -> None:
    first = lines(folders("a loss that is not finite", "2") / "metrics.jsonl")[1]
    assert first["sft/skipped"] == 1
    assert first["sft/loss"] is None


@pytest.mark.parametrize("name", ["1 then 2", "2 then 1"])
def test_another_number_of_processes_resumes_a_run(name: str, folders: Callable[[str, str], Path]) -> None:
    require_same_run(folders("many passes", "1"), folders("many passes", name))


def test_as_many_processes_resume_a_run_exactly(folders: Callable[[str, str], Path]) -> None:
    straight, resumed = folders("many passes", "2"), folders("many passes", "2 then 2")
    logs = [lines(folder / "metrics.jsonl") for folder in (straight, resumed)]
    for line in (*logs[0], *logs[1]):
        line.pop("dpo/tokens_per_second", None)
    assert logs[0] == logs[1]
    last = max((straight / "checkpoints").iterdir())
    names = sorted(path.relative_to(straight) for path in (*last.glob("*.safetensors"), *straight.glob("policy/*")))
    names = [name for name in names if name.suffix == ".safetensors"]
    assert len(names) == 7  # of two processes: weights, moments and best weights; and the policy
    for name in names:
        assert (straight / name).read_bytes() == (resumed / name).read_bytes(), name
