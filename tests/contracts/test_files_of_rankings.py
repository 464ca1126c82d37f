"""Answers to be ranked, the store, its exports, and the pairs of an evaluation: each is read by who needs it next."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from keel.cli.main import main
from keel.data.items import read_unranked_responses
from keel.data.preferences import load_rankings
from keel.ranking.store import Store

from .conftest import Runs


@pytest.fixture(scope="session")
def sampled(runs: Runs) -> Path:
    output = runs.folder / "answers.jsonl"
    command = ["sample", "--model", str(runs.model), "--prompts.path", str(runs.folder / "prompts.jsonl")]
    command += ["--sampling.num-responses", "3", "--sampling.max-response-tokens", "5", "--output", str(output)]
    assert main(command) == 0
    return output


def ranked(store: str, rows: Any) -> None:
    """One rater, who prefers what comes first in the alphabet."""
    with closing(Store.open(store)) as opened:
        opened.add_items(rows)
        opened.add_raters(["anna"])
        while (deal := opened.deal("anna")) is not None:
            shown = [deal.item.responses[place] for place in deal.shown]
            opened.record_judgement("anna", deal.id, [sorted(shown).index(text) + 1 for text in shown])


@pytest.mark.parametrize("form", ["rankings", "pairs"])
def test_from_samples_to_rankings(form: str, sampled: Path, tmp_path: Path) -> None:
    rows = read_unranked_responses(str(sampled))
    written = [json.loads(line) for line in sampled.read_text().splitlines()]
    assert [(row.prompt, list(row.responses)) for row in rows] == [(row["prompt"], row["responses"]) for row in written]
    store, output = str(tmp_path / "ratings.db"), str(tmp_path / "out.jsonl")
    ranked(store, rows)
    assert main(["rank", "--store", store, "--export", output, "--form", form]) == 0
    found = load_rankings(output)
    best = {row["prompt"]: min(row["responses"]) for row in written}
    assert {ranking.prompt for ranking in found} <= set(best)
    for ranking in found:
        assert ranking.ranked.responses[0] == best[str(ranking.prompt)] or form == "pairs"
    checked = ["data", "check", output]
    assert main(checked) == 0


def test_from_an_evaluation_to_people_and_back(runs: Runs, tmp_path: Path) -> None:
    pairs, store, output = (str(tmp_path / name) for name in ("pairs.jsonl", "ratings.db", "judged.jsonl"))
    figures = str(tmp_path / "figures.json")
    command = ["evaluate", "--policy", str(runs.path("ppo") / "policy"), "--against", str(runs.model)]
    command += ["--prompts.path", str(runs.folder / "prompts.jsonl"), "--sampling.max-response-tokens", "5"]
    command += ["--rewards", json.dumps({"function": str(runs.folder / "functions.py:quality")}), "--pairs", pairs]
    assert main(command) == 0
    ranked(store, read_unranked_responses(pairs))
    assert main(["rank", "--store", store, "--export", output]) == 0
    assert main([*command, "--judgements", output, "--output", figures, "--gate", "people.judgements>=1"]) == 0
    found = json.loads(Path(figures).read_text())["figures"]
    assert found["people"]["judgements"] == len(Path(pairs).read_text().splitlines())
    assert "rewards/quality" in found["policy"]
    verdict = json.loads((tmp_path / "figures.gate.json").read_text())
    assert verdict["passed"] is True
