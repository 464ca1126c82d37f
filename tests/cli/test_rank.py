"""`keel rank` beside its pages: what it refuses before anything is lost or mixed."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from keel.cli.main import main
from keel.data.items import read_unranked_responses
from keel.ranking.store import Store


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "responses": ["a", "b", "c"]}) + "\n" for i in range(3)))
    return path


@pytest.fixture
def ranked(tmp_path: Path, answers: Path) -> str:
    """A store with one ranking."""
    path = str(tmp_path / "ratings.db")
    with closing(Store.open(path)) as store:
        store.add_items(read_unranked_responses(str(answers)))
        store.add_raters(["anna"])
        store.remember("mode", "rankings")
        deal = store.deal("anna")
        assert deal is not None
        store.record_judgement("anna", deal.id, [1, 2, 3])
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_an_export_replaces_an_export_and_nothing_else(
    ending: str, ranked: str, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    target = tmp_path / f"rankings{ending}"
    for form in ("rankings", "pairs"):
        for aggregate in ("false", "true"):
            command = ["rank", "--store", ranked, "--export", str(target), "--form", form, "--aggregate", aggregate]
            assert main(command) == 0
    other = answers.rename(answers.with_name(f"answers-of-mine{ending}"))
    before = other.read_bytes()
    capsys.readouterr()
    assert main(["rank", "--store", ranked, "--export", str(other)]) == 2
    assert "exists, and is not an earlier export" in capsys.readouterr().err
    assert other.read_bytes() == before


def test_a_study_is_of_rankings_or_of_pairs(ranked: str, answers: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["rank", str(answers), "--store", ranked, "--mode", "pairs", "--port", "47123"]) == 2
    assert "the store holds rankings" in capsys.readouterr().err
    with closing(Store.open(ranked)) as store:
        assert len(store.items()) == 3


def test_what_cannot_be_served_leaves_no_store(answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = tmp_path / "new.db"
    for more in (["--instructions", str(tmp_path / "none.txt")], ["--host", "192.0.2.1"]):
        assert main(["rank", str(answers), "--store", str(store), *more]) == 2
    shown = capsys.readouterr().err
    assert "none.txt" in shown
    assert "--public true" in shown
    assert not store.exists()


def test_a_file_is_not_converted_into_itself(answers: Path, capsys: pytest.CaptureFixture[str]):
    pairs = answers.with_name("pairs.jsonl")
    pairs.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": 1}\n')
    before = pairs.read_bytes()
    assert main(["data", "check", str(pairs), "--convert", str(pairs)]) == 2
    assert "this is the file that was read" in capsys.readouterr().err
    assert pairs.read_bytes() == before
