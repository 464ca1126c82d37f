"""Run folders are read in any state in which a run can leave them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from keel.diagnosis.doctor import diagnose
from keel.errors import CheckpointError, ConfigError
from keel.run.read.run import read_run

from ..diagnosis.runs import healthy, settings


def folder_of(path: Path, lines: list[str], ended: dict[str, str] | None = None, **changes: object) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(settings(**changes)))
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if ended:
        (path / "ended.json").write_text(json.dumps(ended))
    return path


def lines_of(steps: int = 40) -> list[str]:
    columns = healthy(0, steps)
    return [json.dumps({"step": i + 1, **{name: float(x[i]) for name, x in columns.items()}}) for i in range(steps)]


def test_metrics_are_columns_and_gaps_are_nan(tmp_path: Path):
    run = read_run(folder_of(tmp_path / "run", ['{"step": 1, "a": 1.5}', '{"step": 2, "a": null, "b": 3}']))
    assert run.steps.tolist() == [1, 2]
    np.testing.assert_array_equal(run["a"], [1.5, np.nan])
    np.testing.assert_array_equal(run["b"], [np.nan, 3.0])
    np.testing.assert_array_equal(run["no such figure"], [np.nan, np.nan])
    assert run.has("b")
    assert not run.has("c")


def test_an_incomplete_line_is_skipped(tmp_path: Path):
    folder = folder_of(
        tmp_path / "run", ['{"step": 1, "a": 1.5}', '{"step": 2, "a": 2}', '{"step": 3, "a": null, "b": 0.25}']
    )
    whole = (folder / "metrics.jsonl").read_bytes()
    third = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(third, len(whole)):
        (folder / "metrics.jsonl").write_bytes(whole[:end])
        assert read_run(folder).steps.tolist() == [1, 2]


def test_a_step_that_was_repeated_counts_once_as_last_written(tmp_path: Path):
    run = read_run(folder_of(tmp_path / "run", ['{"step": 1, "a": 1}', '{"step": 2, "a": 2}', '{"step": 2, "a": 7}']))
    assert run.steps.tolist() == [1, 2]
    assert run["a"].tolist() == [1.0, 7.0]


def test_a_broken_line_is_an_error_with_its_number(tmp_path: Path):
    folder = folder_of(tmp_path / "run", ['{"step": 1}', "oh", '{"step": 3}'])
    with pytest.raises(CheckpointError) as error:
        read_run(folder)
    assert error.value.where == f"{folder}/metrics.jsonl:2"


@pytest.mark.parametrize(("make", "message"), [(False, "no such folder"), (True, "this folder holds no run")])
def test_a_folder_without_a_run_is_refused(make: bool, message: str, tmp_path: Path):
    if make:
        (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path / "run")


def test_a_file_is_refused(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="not a folder"):
        read_run(tmp_path / "run.yaml")


def test_a_run_before_its_first_step(tmp_path: Path):
    folder = folder_of(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    diagnosis = diagnose(read_run(folder))
    assert (diagnosis.verdict, diagnosis.last_step, diagnosis.findings) == ("unknown", 0, ())


@pytest.mark.parametrize("value", [None, "0.5", [1.0]], ids=str)
def test_a_run_without_a_number_is_not_called_healthy(tmp_path: Path, value: object):
    lines = [json.dumps({"step": step, "objective/scores": value}) for step in (1, 2, 3)]
    assert diagnose(read_run(folder_of(tmp_path / "run", lines))).verdict == "unknown"


def test_the_state_of_a_run(tmp_path: Path):
    folder = folder_of(tmp_path / "run", lines_of(2))
    assert read_run(folder).state.standing == "unknown"
    lock = folder / ".lock"
    lock.write_text(f"process {os.getpid()} since 2026-01-01 00:00:00")
    assert read_run(folder).state.standing == "running"
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    lock.write_text(f"process {gone.stdout.strip()} since 2026-01-01 00:00:00")
    assert read_run(folder).state.standing == "died"
    (folder / "ended.json").write_text('{"standing": "failed", "what": "RewardError: refused"}')
    assert (read_run(folder).state.standing, read_run(folder).state.what) == ("failed", "RewardError: refused")
    (folder / "ended.json").write_text("{")
    assert read_run(folder).state.standing == "died"


def test_scorers_have_the_names_of_their_metrics(tmp_path: Path):
    rewards = [
        {"model": "runs/a/model", "weight": 1.0},
        {"model": "runs/b/model", "weight": 0.0},
        {"function": "f.py:polite"},
        {"url": "http://127.0.0.1:5000/get_reward?x=1", "weight": 0.5},
    ]
    run = read_run(folder_of(tmp_path / "run", [], rewards=rewards))
    assert run.scorer_weights() == {"a": 1.0, "b": 0.0, "polite": 1.0, "get_reward": 0.5}
    assert run.held_out_scorers() == ["b"]


NO_LINES = [
    b'{"step": Infinity}',
    b'{"step": NaN}',
    b'{"step": 1e20}',
    b'{"step": 3.0}',
    b'{"step": 99999999999999999999999}',
    b'{"step": 1' + b"0" * 5000 + b"}",
    b'{"step": -1}',
    b'{"step": true}',
    b'{"step": "3"}',
    b'{"step": null}',
    b'{"objective/kl": 1}',
    b'{"step": 3, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b"[3]",
    b"3",
    b"",
    b"\xff\x00",
]


@pytest.mark.parametrize("line", NO_LINES, ids=lambda line: repr(line[:20]))
def test_a_line_without_metrics_is_an_error_with_its_number(line: bytes, tmp_path: Path):
    folder = folder_of(tmp_path / "run", [])
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n' + line + b'\n{"step": 4}\n')
    with pytest.raises(CheckpointError) as error:
        read_run(folder)
    assert str(error.value) == f"{folder}/metrics.jsonl:3: not a line of a run's metrics"


def test_a_value_that_is_not_finite_counts_as_not_measured(tmp_path: Path):
    values = ["Infinity", "-1e400", "1" + "0" * 400, "[1]", '"1"', "{}", "2"]
    run = read_run(folder_of(tmp_path / "run", [f'{{"step": {i}, "a": {value}}}' for i, value in enumerate(values)]))
    np.testing.assert_array_equal(run["a"], [np.nan] * 6 + [2.0])


BAD_ENDS = [
    ("ended.json", b'{"standing": 5, "what": ""}', "unknown"),
    ("ended.json", b'{"standing": ["failed"], "what": ""}', "unknown"),
    ("ended.json", b'{"standing": "asleep", "what": ""}', "unknown"),
    ("ended.json", b"[1]", "died"),
    ("ended.json", b"\x80\x00\xff", "died"),
    ("ended.json", b"[" * 100_000, "died"),
    (".lock", b"process 99999999999999999999 since 2026", "unknown"),
    (".lock", b"process -1 since 2026", "unknown"),
    (".lock", b"process 0 since 2026", "unknown"),
    (".lock", b"\xff", "unknown"),
]


@pytest.mark.parametrize(("name", "content", "standing"), BAD_ENDS)
def test_an_unreadable_end_file_is_ignored(name: str, content: bytes, standing: str, tmp_path: Path):
    folder = folder_of(tmp_path / "run", [])
    (folder / ".lock").write_text("process 2147483646 since 2026")  # larger than any process id
    (folder / name).write_bytes(content)
    assert read_run(folder).state.standing == standing


@pytest.mark.parametrize("content", ["5", "[]", '{"accuracy": "x", "length_accuracy": {}}', "[" * 100_000, "\0"])
def test_invalid_metrics_of_a_reward_model_are_not_used(content: str, tmp_path: Path):
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "figures.json").write_text(content)
    rewards = [{"model": str(tmp_path / "reward" / "model"), "weight": 1.0}]
    assert read_run(folder_of(tmp_path / "run", [], rewards=rewards)).reward_models() == {}


BAD_SETTINGS = {
    "rewards": [[1], {}, "model", 3, [{"weight": "heavy"}], [{"weight": None}], [{1: 2}], [{"model": 5}]],
    "steps": ["abc", [1, 2], {}, float("inf"), float("nan"), 0, -3, 1.5, True, 10**30],
    "rollout": ["abc", [1], {"batch_size": 0}, {"batch_size": "many"}, {"max_response_tokens": float("nan")}],
    "algorithm": [7, {"kl_coef": "0.1"}, {"gamma": [1]}, {"target_kl": {}}],
    "optim": [{"learning_rate": 0}, {"learning_rate": "1e-5"}, {"critic_learning_rate": True}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in BAD_SETTINGS.items() for value in bad])
def test_invalid_settings_are_an_error_with_their_name(name: str, value: object, tmp_path: Path):
    folder = folder_of(tmp_path / "run", lines_of(3))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings() | {name: value}))
    with pytest.raises(CheckpointError, match=f"config.yaml: {name}") as error:
        read_run(folder)
    assert error.value.where == f"{folder}/config.yaml"


NO_SETTINGS = ["- a", "5", "", "a: 2020-13-45", "a: !!int ''", "a: !!timestamp x", "\0", "[" * 10_000, "!!python/x 1"]


@pytest.mark.parametrize("content", NO_SETTINGS, ids=lambda text: text[:20])
def test_a_file_without_settings_is_an_error(content: str, tmp_path: Path):
    folder = folder_of(tmp_path / "run", lines_of(3))
    (folder / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError) as error:
        read_run(folder)
    assert error.value.where == f"{folder}/config.yaml"


def test_settings_of_another_version_are_read(tmp_path: Path):
    """A setting and a value that this version does not know, and a missing section."""
    others = {"algorithm": {"name": "ppo2", "new": "x"}, "optim": None, "magic": [1], "doctor": "shout"}
    folder = folder_of(tmp_path / "run", lines_of(3), **others)
    assert read_run(folder).steps.tolist() == [1, 2, 3]


def test_any_content_of_the_files_gives_a_diagnosis_or_an_error(tmp_path: Path):
    """Replace one value after the other; the result is a diagnosis, or an error of one line."""
    folder, told = folder_of(tmp_path / "run", lines_of(12)), settings()
    strange = [None, True, -1, 0, 1, 0.5, 10**17, 1e-300, "x", [], {}]
    places = [(name, None) for name in told]
    places += [(name, key) for name, inner in told.items() if isinstance(inner, dict) for key in inner]
    seen = set()
    for name, key in places:
        for value in strange:
            changed = told | {name: value if key is None else told[name] | {key: value}}
            (folder / "config.yaml").write_text(yaml.safe_dump(changed))
            try:
                seen.add(type(diagnose(read_run(folder))).__name__)
            except CheckpointError as error:
                seen.add(error.where)
    assert seen == {"Diagnosis", f"{folder}/config.yaml"}


def test_no_torch_is_needed(tmp_path: Path):
    folder = folder_of(tmp_path / "run", lines_of())
    code = (
        "import sys; from keel.cli.main import main; code = main(['doctor', sys.argv[1]]); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{folder}: healthy (step 40 of 40")


def test_five_thousand_steps_are_fast(tmp_path: Path):
    """Work is linear in the steps: a rule that used all earlier steps at each one would take minutes."""
    columns = healthy(0, 5000)
    from ..diagnosis.runs import run_of

    diagnosis = diagnose(run_of(columns, settings(5000)))
    assert [finding.name for finding in diagnosis.findings] == []
