"""`keel data check` as a person and a script see it: what is printed, the exit code, --json, --convert."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keel.cli.main import main
from keel.data.preferences import load_rankings


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["data", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


PAIRS = [{"prompt": f"p{i}", "chosen": "good one", "rejected": "bad"} for i in range(3)]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", *PAIRS)


def test_a_sound_file_is_told_and_passes(pairs: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, "check", pairs)
    assert (code, err) == (0, "")
    assert "comparisons (pairs)" in out
    assert "3, all can be used" in out
    assert "100.0% of the pairs of unequal length" in out


def test_broken_rows_are_named_and_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "rows.jsonl", *PAIRS, "{", {"prompt": "p\x1b[2J", "chosen": 1, "rejected": "x"})
    code, out, err = run(capsys, "check", path)
    assert code == 2
    assert "line 4" in out
    assert 'expected text or a list in "chosen"' in out
    assert err.splitlines() == [f"keel: error: {path}: 2 of 5 rows cannot be used"]


def test_leaks_fail(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    held_out, other = write(tmp_path / "held.jsonl", PAIRS[1]), write(tmp_path / "other.jsonl", {"prompt": "q"})
    code, out, err = run(capsys, "check", pairs, "--against", other, "--against", held_out)
    assert code == 2
    assert f"1 with {held_out}, 1 row: line 2" in out
    assert f"0 with {other}, none" in out
    assert err == f"keel: error: {pairs}: 1 row with prompts of {held_out}\n"
    assert run(capsys, "check", pairs, "--against", other)[0] == 0


def test_json_is_one_object_also_where_the_file_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "rows.jsonl", *PAIRS, "{")
    code, out, err = run(capsys, "check", path, "--json")
    figures = json.loads(out)
    assert (code, figures["rows"], figures["usable"], figures["broken"]["why"][0]["line"]) == (2, 4, 3, 4)
    assert "1 of 4 rows cannot be used" in err


def test_convert_writes_what_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        {"query": "q", "sample0": "a", "sample1": "b", "best": 1},
        "{",
        {"context": "p", "completions": [{"rank": 1, "completion": "x"}, {"rank": 0, "completion": "y"}]},
        PAIRS[0] | {"margin": 2.0, "rater": "anna"},
    ]
    path, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl"
    assert run(capsys, "check", path, "--convert", out)[0] == 2
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1]},
        {"prompt": "p", "responses": ["x", "y"], "ranks": [2, 1]},
        PAIRS[0] | {"margin": 2.0, "rater": "anna"},
    ]
    assert run(capsys, "check", out)[0] == 0
    assert [ranking.margin for ranking in load_rankings(str(out))] == [0.0, 0.0, 2.0]


def test_convert_of_prompts_and_to_another_ending_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts, pairs = write(tmp_path / "p.jsonl", {"prompt": "p"}), write(tmp_path / "rows.jsonl", *PAIRS)
    code, _, err = run(capsys, "check", prompts, "--convert", tmp_path / "out.jsonl")
    assert (code, "nothing to convert" in err) == (2, True)
    code, _, err = run(capsys, "check", pairs, "--convert", tmp_path / "out.csv")
    assert (code, "does not end in .jsonl" in err) == (2, True)
    assert not (tmp_path / "out.jsonl").exists()


def test_nothing_in_a_file_steers_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    evil = "\x1b]0;x\x07\x1b[31m\u202e"
    rows = [PAIRS[0] | {"rater": evil, "source": evil}, {evil: 1, "prompt": evil}]
    _, out, err = run(capsys, "check", write(tmp_path / "rows.jsonl", *rows))
    _, _, other = run(
        capsys, "check", write(tmp_path / "one.jsonl", {evil: 1}), "--against", tmp_path / f"{evil}.jsonl"
    )
    assert not any(c in out + err + other for c in "\x1b\x07\u202e")
    assert r"\x1b]0;x\x07\x1b[31m\u202e: 1" in out


@pytest.mark.parametrize("arguments", [[], ["chek", "x.jsonl"], ["x.jsonl"]])
def test_the_only_subverb_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "keel data check FILE" in err


def test_a_check_loads_nothing_heavy(pairs: Path):
    script = (
        "import sys; from keel.cli.main import main; code = main(['data', 'check', sys.argv[1]]);"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules);"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(pairs)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
