"""Judging a policy on prompts, alone and against another: what `keel evaluate` does."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel.config import DecodingSettings, EvaluateConfig
from keel.data.batches import Rollouts, ScoredRollouts
from keel.data.prompts import Prompt
from keel.errors import ConfigError
from keel.learn.targets import analyze_all, reference_logprobs
from keel.models.loading import load_tokenizer
from keel.models.policy import ActorCritic
from keel.rollout.collect import score
from keel.rollout.scorers import build_scorers
from keel.run.folder import write_atomic
from keel.run.metrics import finite
from keel.train.progress import ProgressDisplay
from keel.train.sample import Player, grouped, load_frozen, load_player
from keel.world import World, generator

PASS_TOKENS = 16_384  # padded tokens of one forward pass; no figure depends on it
Scoring = Callable[[Rollouts], ScoredRollouts]
PER_TOKEN = ("entropy", "reference_logprob")  # reported as means over tokens; the rest as means over answers


@dataclass(frozen=True)
class Judged:
    """A policy's answers, N prompts and k to each, and what was measured of them."""

    texts: list[list[str]]
    measured: dict[str, Tensor]  # name -> [N, k]; the names of PER_TOKEN hold sums over the answer's tokens

    def summary(self) -> dict[str, float]:
        """One figure for each measure, over all answers."""
        tokens = self.measured["length"].sum()
        return {
            name: float(values.sum() / tokens) if name in PER_TOKEN else float(values.nanmean())
            for name, values in self.measured.items()
        }


def evaluate(config: EvaluateConfig, functions: Sequence[Callable[..., Any]] = ()) -> dict[str, Any]:
    """Figures of the policy, of the one it is compared with, and of the comparison; written to `config.output`.

    `functions` are Python reward functions besides `config.rewards`. Raises ConfigError, DataError or RewardError.
    """
    World.single()
    players = {"policy": load_player(config.policy, config.prompts, config.sampling)}
    scorers = build_scorers(config.rewards, functions) if config.rewards or functions else []
    if config.against:
        players["against"] = load_player(config.against, config.prompts, config.sampling)
    references = load_references(config, players)
    decoding, count = config.sampling, len(players["policy"].prompts)
    judged = {}
    with ProgressDisplay("evaluate", len(players) * count * decoding.num_responses) as display:
        for number, (side, player) in enumerate(players.items()):
            done = number * count * decoding.num_responses
            judged[side] = judge(
                player,
                references[side],
                partial(score, scorers=scorers, tokenizer=player.tokenizer) if scorers else None,
                decoding,
                config.seed,
                side,
                lambda more, figures, done=done: display.show(done + more, figures),  # type: ignore[misc]
            )
    figures: dict[str, Any] = {"prompts": count, "responses_per_prompt": decoding.num_responses}
    figures |= {side: answers.summary() for side, answers in judged.items()}
    if config.against and scorers:
        figures |= comparison(judged["policy"].measured["score"], judged["against"].measured["score"], config.seed)
    if config.output:
        record = {"figures": figures, "answers": list(_answer_rows(players["policy"].prompts, judged))}
        write_atomic(Path(config.output), json.dumps(finite(record), ensure_ascii=False, indent=1) + "\n")
    return figures


def load_references(config: EvaluateConfig, players: Mapping[str, Player]) -> dict[str, ActorCritic | None]:
    """For each player the model its KL is measured to; None without one, or when that one reads other tokens.

    Raises ConfigError when a reference was asked for whose vocabulary is not the players'.
    """
    name = config.reference or config.against
    if name is None:
        return dict.fromkeys(players)
    vocabulary = load_tokenizer(name).get_vocab()
    same = {side: player.tokenizer.get_vocab() == vocabulary for side, player in players.items()}
    if config.reference and not all(same.values()):
        raise ConfigError("its vocabulary is not that of the policies, so there is no KL", where=f"reference {name}")
    loaded = next((player.model for player in players.values() if player.name == name), None) or load_frozen(name)
    return {side: loaded if same[side] else None for side in players}


def judge(
    player: Player,
    reference: ActorCritic | None,
    scoring: Scoring | None,
    decoding: DecodingSettings,
    seed: int,
    side: str,
    show: Callable[[int, dict[str, float]], None] = lambda done, figures: None,
) -> Judged:
    """Let a player answer all prompts and measure the answers. Both sides draw their own random numbers."""
    texts: list[str] = []
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for rollouts in player.answers(decoding, seed, "evaluate", side):
        texts += rollouts.texts
        for name, values in measure(rollouts, player, reference, scoring, decoding.temperature).items():
            parts[name].append(values.cpu())
        show(len(texts), {name: float(parts[name][-1].nanmean()) for name in ("score",) if name in parts})
    k = decoding.num_responses
    return Judged(grouped(texts, k), {name: torch.cat(values).view(-1, k) for name, values in parts.items()})


def measure(
    rollouts: Rollouts, player: Player, reference: ActorCritic | None, scoring: Scoring | None, temperature: float
) -> dict[str, Tensor]:
    """Name -> [B]: score, each scorer's own, kl (sum of k1), length, truncated, and the sums of PER_TOKEN."""
    measured: dict[str, Tensor] = {}
    if scoring is not None:
        scored = scoring(rollouts)
        measured["score"] = scored.scores
        measured |= {f"rewards/{name}": values for name, values in scored.by_scorer.items()}
    own = analyze_all(player.model, rollouts, temperature, PASS_TOKENS)
    if reference is not None:
        theirs = reference_logprobs(reference, rollouts, temperature, PASS_TOKENS)
        measured["kl"] = (own.logprobs - theirs).sum(1)
        measured["reference_logprob"] = theirs.sum(1)
    measured["entropy"] = own.entropy.sum(1)
    measured["length"] = rollouts.lengths.double()
    measured["truncated"] = rollouts.truncated.double()
    return {name: values.double() for name, values in measured.items()}


def comparison(ours: Tensor, theirs: Tensor, seed: int) -> dict[str, float]:
    """Win rate and score difference with 95% intervals over prompts, from scores [N, k] and [N, j].

    A prompt's win rate is that of all pairs of our and their answers to it; a tie counts half.
    """
    difference = ours.unsqueeze(2) - theirs.unsqueeze(1)
    wins = ((difference.sign() + 1) / 2).mean((1, 2))
    figures = {"ties": float((difference == 0).double().mean())}
    for name, values in {"win_rate": wins, "score_difference": difference.mean((1, 2))}.items():
        low, high = bootstrap_interval(values, seed)
        figures |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    return figures


def bootstrap_interval(values: Tensor, seed: int, level: float = 0.95, resamples: int = 10_000) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [N], each resample drawing N of them (Efron 1979)."""
    values, numbers = values.double().cpu(), generator(seed, "bootstrap")
    at_once = max(1, 2**22 // len(values))
    means = [
        values[torch.randint(len(values), (min(at_once, resamples - start), len(values)), generator=numbers)].mean(1)
        for start in range(0, resamples, at_once)
    ]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(tails).tolist()
    return low, high


def _answer_rows(prompts: list[Prompt], judged: dict[str, Judged]) -> Iterator[dict[str, Any]]:
    """For each prompt the answers of each side with their scores."""
    for row, prompt in enumerate(prompts):
        answers: dict[str, Any] = {"prompt": prompt.content}
        for side, found in judged.items():
            answers[side] = found.texts[row]
            if "score" in found.measured:
                answers[f"{side}_scores"] = found.measured["score"][row].tolist()
        yield answers
