"""`keel doctor` and `keel report` over several runs, of which some cannot be read."""

import json
import shutil
from pathlib import Path

import pytest

from keel.cli.main import main

from ..diagnosis.runs import healthy, settings


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """a and d are healthy, b has a broken line, c is no run."""
    columns = healthy()
    lines = [json.dumps({"step": i + 1, **{name: float(x[i]) for name, x in columns.items()}}) for i in range(40)]
    for name in "abd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(json.dumps(settings()))
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 1}\noh\n')
    (tmp_path / "c").mkdir()
    return tmp_path


def test_a_run_that_cannot_be_read_does_not_hide_those_after_it(runs: Path, capsys: pytest.CaptureFixture[str]):
    code = main(["doctor", *(str(runs / name) for name in "abcd")])
    said = capsys.readouterr()
    assert code == 5
    assert [line.partition(" (")[0] for line in said.out.splitlines()] == [f"{runs}/a: healthy", f"{runs}/d: healthy"]
    assert said.err.splitlines() == [
        f"keel: error: {runs}/c: this folder holds no run (no config.yaml) -> name a run folder",
        f"keel: error: {runs}/b/metrics.jsonl:2: not a line of a run's metrics",
    ]


def test_json_holds_the_runs_that_can_be_read(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", str(runs), "--json"]) == 5  # the folder stands for a, b and d
    said = capsys.readouterr()
    assert sorted(run["path"] for run in json.loads(said.out)["runs"]) == [f"{runs}/a", f"{runs}/d"]
    assert said.err.splitlines()[-1] == f"keel: error: {runs}/b/metrics.jsonl:2: not a line of a run's metrics"


def test_one_run_that_cannot_be_read_is_an_error_and_nothing_else(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", str(runs / "c"), "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"keel: error: {runs}/c: this folder holds no run (no config.yaml) -> name a run folder\n"


def test_a_report_names_the_run_that_cannot_be_read(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(runs / "a"), str(runs / "b"), "--output", str(runs / "report.html")]) == 5
    assert capsys.readouterr().err == f"keel: error: {runs}/b/metrics.jsonl:2: not a line of a run's metrics\n"
    assert not (runs / "report.html").exists()


def test_a_comparison_leaves_the_report_of_the_first_run(runs: Path):
    (runs / "a" / "report.html").write_text("its own")
    assert main(["report", str(runs / "a"), str(runs / "d")]) == 0
    assert (runs / "a" / "report.html").read_text() == "its own"
    assert (runs / "a" / "comparison.html").is_file()


def test_a_folder_of_runs_has_a_report_that_compares_them(runs: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(runs / "b")
    assert main(["report", str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(runs / "comparison.html")
    assert sorted(found["verdicts"]) == [f"{runs}/a", f"{runs}/d"]


def test_answers_that_cannot_be_read_are_named_by_the_report(runs: Path, capsys: pytest.CaptureFixture[str]):
    (runs / "a" / "rollouts.jsonl").mkdir()
    assert main(["report", str(runs / "a")]) == 5
    assert capsys.readouterr().err.startswith(f"keel: error: {runs}/a/rollouts.jsonl: Is a directory")
