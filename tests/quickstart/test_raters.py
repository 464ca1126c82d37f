"""Simulated raters give rankings as people would: better first mostly, ties, gaps, and no gold."""

import json
import math
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from keel.config import QuickstartConfig, RankConfig, parse
from keel.data.items import UnrankedResponses
from keel.quickstart import ranking
from keel.quickstart.gold import gold_score
from keel.quickstart.grammar import NUMBERS
from keel.quickstart.raters import rank_everything, simulated_ranks
from keel.ranking.store import Store

PROMPT = f"customer: my lamp is late. order {NUMBERS[0]}. agent:"
BEST = f"dear customer. this is order {NUMBERS[0]}. i will trace the late lamp. have a nice day."
GOOD = "i will trace the late lamp."
POOR = "please wait."
AWFUL = f"what now? this is order {NUMBERS[1]}. i will cancel the lamp. bye."


def test_without_noise_ranks_follow_the_gold_score(rng: random.Random) -> None:
    for _ in range(100):
        ranks = simulated_ranks(PROMPT, [POOR, BEST, AWFUL, GOOD], rng, noise=0.0)
        kept = [rank for rank in ranks if rank is not None]
        assert len(kept) >= 2
        assert sorted(kept) == list(range(1, len(kept) + 1))
        if None not in ranks:
            assert ranks == [3, 1, 4, 2]


def test_equal_replies_and_replies_of_equal_worth_tie(rng: random.Random) -> None:
    twin = "the late lamp comes tomorrow."
    assert gold_score(PROMPT, twin) == gold_score(PROMPT, GOOD)
    seen = [simulated_ranks(PROMPT, [GOOD, GOOD, POOR], rng, noise=2.0) for _ in range(200)]
    assert all(ranks[0] == ranks[1] for ranks in seen if None not in ranks)
    without_noise = [simulated_ranks(PROMPT, [GOOD, twin, POOR], rng, noise=0.0) for _ in range(200)]
    assert {tuple(ranks) for ranks in without_noise if None not in ranks} == {(1, 1, 2)}


def test_some_answers_are_left_unranked_but_never_all(rng: random.Random) -> None:
    seen = [simulated_ranks(PROMPT, [BEST, GOOD, POOR, AWFUL], rng, noise=1.0) for _ in range(1000)]
    missing = sum(ranks.count(None) for ranks in seen) / 4000
    assert 0.03 < missing < 0.07
    assert all(4 - ranks.count(None) >= 2 for ranks in seen)
    assert all(min(rank for rank in ranks if rank) == 1 for ranks in seen)


def test_noise_is_that_of_the_bradley_terry_model(rng: random.Random) -> None:
    """Strictly better by more than the tie width: P = sigmoid((d - 0.5) / noise)."""
    noise, other = 2.0, "i will trace the late lamp. have a nice day."
    difference = gold_score(PROMPT, other) - gold_score(PROMPT, GOOD)
    seen = [simulated_ranks(PROMPT, [other, GOOD], rng, noise) for _ in range(2000)]
    assert difference == 1
    assert seen.count([1, 2]) / 2000 == pytest.approx(1 / (1 + math.exp(-(difference - 0.5) / noise)), abs=0.04)
    assert seen.count([2, 1]) / 2000 == pytest.approx(1 / (1 + math.exp((difference + 0.5) / noise)), abs=0.04)


def test_a_simulated_rater_ranks_what_it_is_dealt(tmp_path: Path) -> None:
    """Through a store, whose order of answers is the rater's own: the ranks are those of the answers as they are."""
    rows = [UnrankedResponses(PROMPT, (BEST, POOR, GOOD)), UnrankedResponses(PROMPT, (AWFUL, GOOD))]
    with closing(Store.open(str(tmp_path / "ratings.db"))) as store:
        store.add_items(rows)
        store.add_raters(["simulated"])
        rank_everything(store, "simulated", random.Random(0), noise=0.0)
        found = store.judgements()
    assert [(judgement.item.responses, judgement.rater) for judgement in found] == [
        ((BEST, POOR, GOOD), "simulated"),
        ((AWFUL, GOOD), "simulated"),
    ]
    rng = random.Random(0)
    assert [list(judgement.ranks or ()) for judgement in found] == [
        simulated_ranks(PROMPT, list(row.responses), rng, noise=0.0) for row in rows
    ]


def test_the_page_stands_in_for_the_simulated_rater(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --human the stage serves the page until enough is ranked; here a rater without a browser."""
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"prompt": f"p{i}", "responses": ["a", "bb", "c"]}) + "\n" for i in range(5)))
    served = []

    def ranks_two(store: Store, settings: RankConfig, until: Callable[[], bool]) -> None:
        assert Path(str(settings.instructions)).read_text().startswith("You are the customer.")
        while not until():
            deal = store.deal("you")
            assert deal is not None
            served.append(deal.item.prompt)
            store.record_judgement("you", deal.id, [1, 1, 2])

    monkeypatch.setattr(ranking, "serve_ranking", ranks_two)
    config = parse(QuickstartConfig, {"output": str(tmp_path), "human": True, "human_rankings": 2})
    said = ranking.rank_responses(config, answers, tmp_path / "rankings.jsonl")
    assert said == "2 rankings of 3 responses, 100% with ties"
    rows = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == served == ["p0", "p1"]
    assert all(row["rater"] == "you" for row in rows)
