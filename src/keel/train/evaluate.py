"""Judging policies on prompts, alone and against another: what `keel evaluate` does."""

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

    prompts: list[Prompt]
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
    """Figures of each policy, of the one they are compared with, and of the comparisons; written to `config.output`.

    A single policy's figures are under "policy", and those of its comparison beside that. Several have both under
    "policies" and their short names; each is judged as it would be alone.
    `functions` are Python reward functions besides `config.rewards`. Raises ConfigError, DataError or RewardError.
    """
    World.single()
    sides = sides_of(config)
    readable = check_vocabularies(config, sides)
    scorers = build_scorers(config.rewards, functions) if config.rewards or functions else []
    opponents = {"against": load_player(config.against, config.prompts, config.sampling)} if config.against else {}
    reference = load_reference(config, opponents)

    def judged_side(side: str, folder: str) -> Judged:
        """Of the policies only one at a time is in memory."""
        player = opponents.get(side) or load_player(folder, config.prompts, config.sampling)
        scoring = partial(score, scorers=scorers, tokenizer=player.tokenizer) if scorers else None
        stream = side if side in opponents else "policy"
        with ProgressDisplay(f"evaluate {side}", len(player.prompts) * config.sampling.num_responses) as display:
            return judge(
                player,
                reference if readable[side] else None,
                scoring,
                config.sampling,
                config.seed,
                stream,
                display.show,
            )

    judged = {side: judged_side(side, folder) for side, folder in sides.items()}
    figures = figures_of(config, judged)
    if config.output:
        record = {"figures": figures, "answers": list(_answer_rows(judged))}
        write_atomic(Path(config.output), json.dumps(finite(record), ensure_ascii=False, indent=1) + "\n")
    return figures


def sides_of(config: EvaluateConfig) -> dict[str, str]:
    """Name of each side -> its folder or hub id."""
    names = ["policy"] if len(config.policy) == 1 else short_names(config.policy)
    sides = dict(zip(names, config.policy, strict=True))
    return sides | ({"against": config.against} if config.against else {})


def short_names(paths: Sequence[str]) -> list[str]:
    """The fewest last parts that tell the paths apart, without what they all end in: runs/ppo/policy -> ppo."""
    parts = [Path(path).parts for path in paths]
    while len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len({*names, "against", "prompt"}) == len(names) + 2:  # the two have a meaning of their own in the output
            return names
    return [str(Path(path).absolute()) for path in paths]


def check_vocabularies(config: EvaluateConfig, sides: Mapping[str, str]) -> dict[str, bool]:
    """For each side whether the reference reads its tokens; if not, it has no KL.

    Raises ConfigError where a reference was asked for that does not, or prompts are dropped by differing counts.
    """
    vocabularies = {side: load_tokenizer(folder).get_vocab() for side, folder in sides.items()}
    first = next(iter(vocabularies.values()))
    if config.prompts.too_long == "drop" and any(vocabulary != first for vocabulary in vocabularies.values()):
        raise ConfigError(
            "models with other vocabularies would drop other prompts",
            where="prompts.too_long",
            fix="set it to truncate",
        )
    name = config.reference or config.against
    known = load_tokenizer(name).get_vocab() if name else None
    same = {side: vocabulary == known for side, vocabulary in vocabularies.items()}
    if config.reference and not all(same.values()):
        raise ConfigError("its vocabulary is not that of the policies, so there is no KL", where=f"reference {name}")
    return same


def load_reference(config: EvaluateConfig, opponents: Mapping[str, Player]) -> ActorCritic | None:
    """The model that the KL is measured to, by default the one of `against`; None without either."""
    if config.reference and config.reference != config.against:
        return load_frozen(config.reference)
    return opponents["against"].model if opponents else None


def figures_of(config: EvaluateConfig, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """What `evaluate` returns."""
    against = judged.get("against")
    found = {side: answers.summary() for side, answers in judged.items()}
    compared = {
        side: comparison(answers.measured["score"], against.measured["score"], config.seed)
        for side, answers in judged.items()
        if side != "against" and against is not None and "score" in answers.measured
    }
    figures: dict[str, Any] = {
        "prompts": len(next(iter(judged.values())).texts),
        "responses_per_prompt": config.sampling.num_responses,
    }
    if len(config.policy) == 1:
        return figures | found | compared.get("policy", {})
    policies = {side: found[side] | compared.get(side, {}) for side in found if side != "against"}
    return figures | {"policies": policies} | ({"against": found["against"]} if against else {})


def judge(
    player: Player,
    reference: ActorCritic | None,
    scoring: Scoring | None,
    decoding: DecodingSettings,
    seed: int,
    stream: str,
    show: Callable[[int, dict[str, float]], None] = lambda done, figures: None,
) -> Judged:
    """Let a player answer all prompts and measure the answers. `stream` names the random numbers it draws."""
    texts: list[str] = []
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for rollouts in player.answers(decoding, seed, "evaluate", stream):
        texts += rollouts.texts
        for name, values in measure(rollouts, player, reference, scoring, decoding.temperature).items():
            parts[name].append(values.cpu())
        show(len(texts), {name: float(parts[name][-1].nanmean()) for name in ("score",) if name in parts})
    k = decoding.num_responses
    measured = {name: torch.cat(values).view(-1, k) for name, values in parts.items()}
    return Judged(player.prompts, grouped(texts, k), measured)


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


def _answer_rows(judged: Mapping[str, Judged]) -> Iterator[dict[str, Any]]:
    """For each prompt the answers of each side with their scores."""
    for row, prompt in enumerate(next(iter(judged.values())).prompts):
        answers: dict[str, Any] = {"prompt": prompt.content}
        for side, found in judged.items():
            answers[side] = found.texts[row]
            if "score" in found.measured:
                answers[f"{side}_scores"] = found.measured["score"][row].tolist()
        yield answers
