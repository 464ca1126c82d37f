"""`keel rank --judge`: a judge ranks the items of a study beside the people."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from keel.cli.main import main
from keel.data.preferences import load_rankings
from keel.ranking.agreement import summary
from keel.ranking.store import Store
from keel.web.rank.app import private_links

from ..web.visits import ADDRESS, study
from .endpoint import JudgeEndpoint, judge_endpoint

ROWS = [{"prompt": f"p{i}", "responses": ["bad", "good good", "good"]} for i in range(4)]


@pytest.fixture
def endpoint() -> Iterator[JudgeEndpoint]:
    with judge_endpoint() as served:
        yield served


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def rank(endpoint: JudgeEndpoint, folder: Path, *more: str, words: tuple[str, ...] = ()) -> int:
    settings = endpoint.settings(folder)
    flags = {name: getattr(settings, name) for name in ("url", "model", "rubric", "cache")}
    judge = [part for name, value in flags.items() for part in (f"--judge.{name}", str(value))]
    return main(["rank", *words, "--store", str(folder / "study.db"), *judge, *more])


def rank_as_person(path: Path, name: str, orders: list[list[int]]) -> None:
    """A person ranks the first items; a rank for each of bad, good good, good."""
    with closing(Store.open(str(path))) as store:
        store.add_raters([name])
        for ranks in orders:
            deal = store.deal(name)
            assert deal is not None
            store.record_judgement(name, deal.id, [ranks[place] for place in deal.shown])


def stats(path: Path) -> dict[str, Any]:
    with closing(Store.open(str(path))) as store:
        return summary(store.judgements(), store.items(), store.raters(), store.overlap, store.judges())


def test_a_judge_ranks_every_item_once_and_takes_none_from_the_people(
    endpoint: JudgeEndpoint, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rank(endpoint, tmp_path, words=(str(answers),)) == 0
    assert "critic: 4 items ranked, 0 without a verdict; 4 requests, 0 from the cache" in capsys.readouterr().out
    assert rank(endpoint, tmp_path) == 0
    assert len(endpoint.bodies) == 4
    store = tmp_path / "study.db"
    rank_as_person(store, "anna", [[3, 1, 2]] * 3 + [[1, 2, 3]])  # the overlap of 1 still leaves her all four
    found = stats(store)
    assert (found["judgements"], found["complete"], len(found["raters"])) == (4, 4, 1)
    assert found["agreement"]["value"] is None  # two raters agree: there is one person
    (judge,) = found["judges"]
    assert (judge["name"], judge["model"], judge["done"]) == ("critic", "org/critic", 4)
    # Three items of three pairs in the same order. On the fourth, anna puts bad first: one pair of three is the same.
    assert judge["agreement"]["value"] == pytest.approx(10 / 12)
    assert judge["agreement"]["pairs"] == 12


def test_pairs_are_compared_in_both_orders(endpoint: JudgeEndpoint, answers: Path, tmp_path: Path) -> None:
    assert rank(endpoint, tmp_path, "--mode", "pairs", words=(str(answers),)) == 0
    assert len(endpoint.bodies) == 16  # 4 rows of 3 responses, in 2 pairs each
    with closing(Store.open(str(tmp_path / "study.db"))) as store:
        for judgement in store.judgements():
            assert judgement.ranks is not None
            best = min(range(2), key=lambda place: (judgement.ranks or ())[place] or 9)
            assert judgement.item.responses[best].count("good") >= judgement.item.responses[1 - best].count("good")


def test_an_export_counts_judges_only_where_it_is_told(
    endpoint: JudgeEndpoint, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank(endpoint, tmp_path, words=(str(answers),))
    store, output = tmp_path / "study.db", tmp_path / "rankings.jsonl"
    rank_as_person(store, "anna", [[3, 1, 2]] * 2)

    def exported(*more: str) -> list[dict[str, Any]]:
        assert main(["rank", "--store", str(store), "--export", str(output), *more]) == 0
        return [json.loads(line) for line in output.read_text().splitlines()]

    capsys.readouterr()
    people = exported()
    assert [row["rater"] for row in people] == ["anna", "anna"]
    assert "judge critic: agrees with people on 100% of 6 pairs; left out" in capsys.readouterr().out
    both = exported("--judges", "include")
    marked = [row for row in both if row.get("judge")]
    assert len(both) == 6
    assert {row["rater"] for row in marked} == {"critic"}
    assert {row["agreement"] for row in marked} == {1.0}
    assert marked[0]["ranks"] == [3, 1, 2]
    assert len(load_rankings(str(output))) == 6
    assert len(exported("--aggregate", "true")) == 2
    assert len(exported("--aggregate", "true", "--judges", "include")) == 4
    pairs = exported("--form", "pairs", "--judges", "include")
    assert sum(row.get("judge", False) for row in pairs) == 12


def test_an_item_without_a_verdict_is_left_for_the_next_call(
    endpoint: JudgeEndpoint, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.change = lambda value: "?" if len(endpoint.bodies) in (2, 5, 6) else value
    assert rank(endpoint, tmp_path, words=(str(answers),)) == 0
    shown = capsys.readouterr().out
    assert "3 items ranked, 1 without a verdict" in shown
    assert "1 items without a verdict: the reply is not a JSON object" in shown
    endpoint.change = lambda value: value
    assert rank(endpoint, tmp_path) == 0
    assert "1 items ranked, 0 without a verdict" in capsys.readouterr().out


def test_a_dead_server_leaves_what_was_ranked(
    endpoint: JudgeEndpoint, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keel.ranking.judge_rater.ITEMS_AT_ONCE", 2)
    endpoint.change = lambda value: value if len(endpoint.bodies) <= 2 else endpoint.faults.extend([(401, {}, {})] * 9)
    assert rank(endpoint, tmp_path, words=(str(answers),)) == 4
    with closing(Store.open(str(tmp_path / "study.db"))) as store:
        assert len(store.judgements()) == 2
    endpoint.faults, endpoint.change = [], lambda value: value
    assert rank(endpoint, tmp_path) == 0
    with closing(Store.open(str(tmp_path / "study.db"))) as store:
        assert len(store.judgements()) == 4


def test_names_are_those_of_one_person_or_judge(
    endpoint: JudgeEndpoint, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank(endpoint, tmp_path, words=(str(answers),))
    rank_as_person(tmp_path / "study.db", "anna", [])
    assert rank(endpoint, tmp_path, "--judge.name", "anna") == 2
    assert "the rater 'anna' is a person" in capsys.readouterr().err
    (tmp_path / "rubric.txt").write_text("Something else.")
    assert rank(endpoint, tmp_path) == 2
    assert "has another model or rubric" in capsys.readouterr().err
    assert rank(endpoint, tmp_path, "--judge.name", "second") == 0
    assert main(["rank", "--store", str(tmp_path / "study.db"), "--raters", "second"]) == 2
    assert "the rater 'second' of this study is a judge" in capsys.readouterr().err
    with closing(Store.open(str(tmp_path / "study.db"))) as store:
        assert (list(store.judges()), store.raters()) == (["critic", "second"], ["anna"])


def test_the_owner_sees_the_judge_and_nobody_gets_its_link(
    endpoint: JudgeEndpoint, answers: Path, tmp_path: Path
) -> None:
    there = study(tmp_path, store=str(tmp_path / "study.db"))
    assert rank(endpoint, tmp_path) == 0
    links = private_links(there.store, there.settings)
    assert list(links) == ["anna", "ben", ""]
    page = there.visitor("").client.get(f"{ADDRESS}/owner").text
    assert "Judges, compared with people" in page
    assert "org/critic" in page
    there.store.close()
