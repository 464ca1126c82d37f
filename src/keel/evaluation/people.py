"""Compare two policies by people: write blind pairs of responses, and read the rankings of these pairs."""

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keel.config import EvaluateConfig
from keel.data.preferences import Ranking, parse_ranking, prompt_key
from keel.data.rows import Content, read_rows
from keel.errors import ConfigError, DataError
from keel.evaluation.judged import EvaluatedResponses, Metrics, length_controlled_rate, row_mean
from keel.run.folder import write_atomic
from keel.run.origin import fingerprints


@dataclass(frozen=True)
class Pair:
    """A blind pair, one response of each policy to a prompt, with the entries of the key."""

    prompt: Content
    responses: list[str]  # in the order of the file
    ours: int  # index of the policy's response
    lengths: list[float]  # tokens of the policy's response, then of the other one
    scores: list[float] | None  # by the deciding scorer, in the same order as the lengths

    @property
    def differs(self) -> bool:
        """Whether people must compare the responses; two equal ones are a tie."""
        return self.responses[0] != self.responses[1]


def key_path(pairs: str) -> Path:
    return Path(pairs).with_suffix(".key.json")


def check_pairs(config: EvaluateConfig) -> None:
    """Check the files of the pairs before anything is sampled.

    Raises ConfigError for a file that would be overwritten, or a key that cannot be read.
    """
    if config.pairs is None:
        return
    if not config.pairs.endswith(".jsonl"):
        raise ConfigError("the name must end in .jsonl", where=f"pairs {config.pairs}", fix="rename the file")
    if config.judgements is not None:
        read_key(config)
    elif existing := next((path for path in (Path(config.pairs), key_path(config.pairs)) if path.exists()), None):
        raise ConfigError(
            "the file already exists", f"pairs {existing}", "name another file, or pass its rankings with --judgements"
        )


def write_pairs(
    config: EvaluateConfig, ours: EvaluatedResponses, theirs: EvaluatedResponses, measure: str
) -> dict[str, Any]:
    """Write the first response of each policy to every prompt, in a random order, and the key to a second file."""
    order = random.Random(config.seed)
    pairs = []
    for row, prompt in enumerate(ours.prompts):
        both, ours_at = [ours.texts[row][0], theirs.texts[row][0]], order.randrange(2)
        scores = [float(side.measured[measure][row, 0]) for side in (ours, theirs) if measure in side.measured]
        lengths = [float(side.measured["length"][row, 0]) for side in (ours, theirs)]
        pairs.append(Pair(prompt.content, both[::-1] if ours_at else both, ours_at, lengths, scores or None))
    rows = [{"prompt": pair.prompt, "responses": pair.responses} for pair in pairs if pair.differs]
    key = {**_origin(config), "pairs": [vars(pair) for pair in pairs]}
    assert config.pairs is not None
    write_atomic(key_path(config.pairs), json.dumps(key, ensure_ascii=False, indent=1) + "\n")
    write_atomic(Path(config.pairs), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {
        "file": config.pairs,
        "key": str(key_path(config.pairs)),
        "pairs": len(rows),
        "equal": len(pairs) - len(rows),
    }


def read_key(config: EvaluateConfig) -> list[Pair]:
    """Read the key of the pairs. Raises ConfigError for a key that is unreadable or of other policies or weights."""
    path = key_path(str(config.pairs))
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        origin, pairs = {name: saved[name] for name in _origin(config)}, [Pair(**row) for row in saved["pairs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "the key of the pairs cannot be read",
            where=str(path),
            fix="restore the file that keel evaluate wrote beside the pairs",
        ) from error
    if origin != _origin(config):
        raise ConfigError(
            "these pairs are of other policies or weights",
            str(path),
            "write new pairs of the current policies with --pairs",
        )
    return pairs


def _origin(config: EvaluateConfig) -> dict[str, Any]:
    sides = [config.policy[0], str(config.against)]
    return {"policy": sides[0], "against": sides[1], "sha256": dict(fingerprints(sides))}


def people_metrics(config: EvaluateConfig) -> dict[str, Any]:
    """Compute the win rate by people, also at equal lengths, and their agreement with the scorer.

    A tie counts half, and so do two equal responses, which nobody has to compare. The intervals are over prompts.
    Raises DataError.
    """
    pairs = read_key(config)
    wins_by_pair, counts = read_pair_judgements(str(config.judgements), pairs)
    evaluated = [(pair, wins) for pair, wins in zip(pairs, wins_by_pair, strict=True) if wins]
    by_prompt: dict[str, list[float]] = defaultdict(list)
    agreed: dict[str, list[float]] = defaultdict(list)
    for pair, wins in evaluated:
        by_prompt[prompt_key(pair.prompt)] += wins
        agreed[prompt_key(pair.prompt)] += scorer_agreement(pair, wins)
    metrics: dict[str, Any] = {**counts, "prompts": len(by_prompt)}
    ties = {key: [float(win == 0.5) for win in wins] for key, wins in by_prompt.items()}
    for name, values in {"win_rate": by_prompt, "ties": ties, "agreement": agreed}.items():
        metrics |= _mean(name, values)
    return metrics | _length_controlled(evaluated)


def read_pair_judgements(path: str, pairs: Sequence[Pair]) -> tuple[list[list[float]], dict[str, Any]]:
    """Read the rankings of the pairs.

    Returns for each pair the result of each ranking for the policy (1 won, 1/2 tied, 0 lost), and counts. Raises
    DataError for a file of another form, or without any ranking of these pairs.
    """
    numbers = {(prompt_key(pair.prompt), *sorted(pair.responses)): number for number, pair in enumerate(pairs)}
    wins_by_pair: list[list[float]] = [[] if pair.differs else [0.5] for pair in pairs]
    others, raters = 0, set()
    for row in read_rows(path):
        if "chosen" in row.values:
            raise DataError(
                "the file has pairs, in which ties are lost", f"{path}:{row.number}", "export it with --form rankings"
            )
        ranking = parse_ranking(row, path)
        number = numbers.get((prompt_key(ranking.prompt), *sorted(ranking.responses)))
        if number is None or None in ranking.ranks:
            others += 1
            continue
        wins_by_pair[number].append(policy_win(pairs[number], ranking))
        raters.add(ranking.rater)
    compared = [wins for wins, pair in zip(wins_by_pair, pairs, strict=True) if pair.differs]
    if not any(compared):
        raise DataError(
            "no ranking in this file is of these pairs", path, "pass the file that keel rank exported for these pairs"
        )
    counts = {"judgements": sum(map(len, compared)), "raters": len(raters), "judged_pairs": sum(map(bool, compared))}
    return wins_by_pair, counts | {
        "unjudged_pairs": sum(not wins for wins in compared),
        "equal_pairs": len(pairs) - len(compared),
        "others": others,
    }


def policy_win(pair: Pair, ranking: Ranking) -> float:
    """Return the result of a ranking for the policy: 1 won, 1/2 tied, 0 lost."""
    rank = dict(zip(ranking.responses, ranking.ranks, strict=True))
    ours, theirs = (rank[pair.responses[place]] for place in (pair.ours, 1 - pair.ours))
    assert ours is not None
    assert theirs is not None
    return 0.5 + 0.5 * ((ours < theirs) - (ours > theirs))


def scorer_agreement(pair: Pair, wins: Sequence[float]) -> list[float]:
    """Return the agreement of the scorer with each result that is not a tie; empty for two equal responses.

    1: the scorer prefers the same response. 1/2: the scorer has no preference. 0: it prefers the other one.
    """
    if pair.scores is None or not pair.differs:
        return []
    ours, theirs = pair.scores
    scorer = 0.5 + 0.5 * ((ours > theirs) - (ours < theirs))
    return [1 - abs(scorer - win) for win in wins if win != 0.5]


def _mean(name: str, by_prompt: Mapping[str, Sequence[float]]) -> Metrics:
    """Average over prompts of equal weight; empty without any value."""
    values = torch.tensor([sum(each) / len(each) for each in by_prompt.values() if each], dtype=torch.float64)
    return row_mean(name, values, torch.arange(len(values))) if len(values) else {}


def _length_controlled(evaluated: Sequence[tuple[Pair, list[float]]]) -> Metrics:
    numbers: dict[str, int] = {}
    rows = [
        (win, pair.lengths[0] - pair.lengths[1], numbers.setdefault(prompt_key(pair.prompt), len(numbers)))
        for pair, wins in evaluated
        for win in wins
    ]
    table = torch.tensor(rows, dtype=torch.float64)
    prompts = table[:, 2].long()
    return length_controlled_rate(table[:, 0], table[:, 1], 1 / prompts.bincount()[prompts].double(), prompts)
