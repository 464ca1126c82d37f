"""Two policies before people: pairs that do not say whose answer is whose, and what people said of them."""

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
    """One answer of each policy to a prompt, as it was written for people, and what the key knows of it."""

    prompt: Content
    responses: list[str]  # in the order of the file
    ours: int  # which of the two is the policy's
    lengths: list[float]  # tokens of the policy's answer, and of the other's
    scores: list[float] | None  # of the same two, by the scorer that decides

    @property
    def differs(self) -> bool:
        """The same answer twice is a tie, and nobody has to look at it."""
        return self.responses[0] != self.responses[1]


def key_path(pairs: str) -> Path:
    return Path(pairs).with_suffix(".key.json")


def check_pairs(config: EvaluateConfig) -> None:
    """Raises ConfigError, before anything is sampled, for a file that would be written over or a key that is lost."""
    if config.pairs is None:
        return
    if not config.pairs.endswith(".jsonl"):
        raise ConfigError("must end in .jsonl", where=f"pairs {config.pairs}", fix="rename it")
    if config.judgements is not None:
        read_key(config)
    elif found := next((path for path in (Path(config.pairs), key_path(config.pairs)) if path.exists()), None):
        raise ConfigError("exists already", f"pairs {found}", "name another file, or give the judgements of this one")


def write_pairs(
    config: EvaluateConfig, ours: EvaluatedResponses, theirs: EvaluatedResponses, measure: str
) -> dict[str, Any]:
    """The first answer of each to every prompt, in an order drawn for each pair; the key goes into a file beside."""
    order = random.Random(config.seed)
    pairs = []
    for row, prompt in enumerate(ours.prompts):
        both, place = [ours.texts[row][0], theirs.texts[row][0]], order.randrange(2)
        scores = [float(side.measured[measure][row, 0]) for side in (ours, theirs) if measure in side.measured]
        lengths = [float(side.measured["length"][row, 0]) for side in (ours, theirs)]
        pairs.append(Pair(prompt.content, both[::-1] if place else both, place, lengths, scores or None))
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
    """Raises ConfigError when it cannot be read, or speaks of other weights than those judged now."""
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
            "these pairs are of other policies or weights", str(path), "write pairs of today's with --pairs"
        )
    return pairs


def _origin(config: EvaluateConfig) -> dict[str, Any]:
    sides = [config.policy[0], str(config.against)]
    return {"policy": sides[0], "against": sides[1], "sha256": dict(fingerprints(sides))}


def people_metrics(config: EvaluateConfig) -> dict[str, Any]:
    """Win rate by people, also with length control, and how often the scorer is of their mind; intervals over prompts.

    Ties count half, two equal answers as a tie that nobody had to judge. Raises DataError.
    """
    pairs = read_key(config)
    said, counts = read_pair_judgements(str(config.judgements), pairs)
    evaluated = [(pair, wins) for pair, wins in zip(pairs, said, strict=True) if wins]
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
    """For each pair what each judgement gave the policy (1 won, 1/2 tied, 0 lost), and counts. Raises DataError."""
    places = {(prompt_key(pair.prompt), *sorted(pair.responses)): number for number, pair in enumerate(pairs)}
    said: list[list[float]] = [[] if pair.differs else [0.5] for pair in pairs]
    others, raters = 0, set()
    for row in read_rows(path):
        if "chosen" in row.values:
            raise DataError(
                "holds pairs, in which ties are lost", f"{path}:{row.number}", "export it with --form rankings"
            )
        ranking = parse_ranking(row, path)
        number = places.get((prompt_key(ranking.prompt), *sorted(ranking.responses)))
        if number is None or None in ranking.ranks:
            others += 1
            continue
        said[number].append(policy_win(pairs[number], ranking))
        raters.add(ranking.rater)
    told = [wins for wins, pair in zip(said, pairs, strict=True) if pair.differs]
    if not any(told):
        raise DataError("none of its rankings is of these pairs", path, "give what keel rank exported of `pairs`")
    counts = {"judgements": sum(map(len, told)), "raters": len(raters), "judged_pairs": sum(map(bool, told))}
    return said, counts | {
        "unjudged_pairs": sum(not wins for wins in told),
        "equal_pairs": len(pairs) - len(told),
        "others": others,
    }


def policy_win(pair: Pair, ranking: Ranking) -> float:
    """What a ranking of the two answers gives the policy's."""
    rank = dict(zip(ranking.responses, ranking.ranks, strict=True))
    ours, theirs = (rank[pair.responses[place]] for place in (pair.ours, 1 - pair.ours))
    assert ours is not None
    assert theirs is not None
    return 0.5 + 0.5 * ((ours < theirs) - (ours > theirs))


def scorer_agreement(pair: Pair, wins: Sequence[float]) -> list[float]:
    """For each judgement that prefers one of two different answers: 1 where the scorer prefers it too, 1/2 where it has
    no preference."""
    if pair.scores is None or not pair.differs:
        return []
    ours, theirs = pair.scores
    scorer = 0.5 + 0.5 * ((ours > theirs) - (ours < theirs))
    return [1 - abs(scorer - win) for win in wins if win != 0.5]


def _mean(name: str, by_prompt: Mapping[str, Sequence[float]]) -> Metrics:
    """Each prompt counts alike; nothing where there is none."""
    values = torch.tensor([sum(own) / len(own) for own in by_prompt.values() if own], dtype=torch.float64)
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
