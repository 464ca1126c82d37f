"""Judging policies on prompts, alone and against another: what `keel evaluate` does."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel import __version__
from keel.config import DecodingSettings, EvaluateConfig
from keel.data.batches import Rollouts, ScoredRollouts
from keel.errors import ConfigError
from keel.evaluation.frontier import complete_config, find_checkpoints
from keel.evaluation.gate import gate_verdict, read_gate
from keel.evaluation.judged import EvaluatedResponses
from keel.evaluation.people import check_pairs, key_path, people_metrics, write_pairs
from keel.evaluation.sample import PASS_TOKENS, EvaluatedPolicy, group_texts, load_frozen_model, load_policy
from keel.evaluation.score_once import scored_once
from keel.evaluation.summary import check_metric_names, compute_summary, decider, side_name
from keel.evaluation.untempered_kl import add_untempered_kl
from keel.learn.targets import analyze_all, reference_logprobs
from keel.models.actor_critic import ActorCritic
from keel.models.loading import load_tokenizer
from keel.progress import ProgressDisplay
from keel.rollout.lengths import length_warnings
from keel.rollout.score import score
from keel.rollout.scorers import Scorer, build_scorers, check_signatures
from keel.run.folder import write_atomic
from keel.run.json_values import finite
from keel.run.origin import fingerprints
from keel.run.output import require_writable
from keel.terminal import tell
from keel.world import World

Scoring = Callable[[Rollouts], ScoredRollouts]


def evaluate_policies(config: EvaluateConfig, functions: Sequence[Callable[..., Any]] = ()) -> dict[str, Any]:
    """Figures of each policy, of the one they are compared with, and of the comparisons; written to `config.output`.

    A single policy's figures are under "policy", and those of its comparison beside that. Several have both under
    "policies" and their short names; each is judged as it would be alone. NAME_low and NAME_high are the ends of a 95%
    interval over prompts. What was asked for besides is under "slices", "best_of", "frontier", "people" and "gate".
    `functions` are Python reward functions besides `config.rewards`. Raises ConfigError, DataError or RewardError.
    """
    World.single()
    config = complete_config(config)
    demands = read_gate(config.gate) if config.gate is not None else []
    check_pairs(config)
    check_outputs(config, bool(demands))
    sides = side_paths(config)
    readable = check_vocabularies(config, sides)
    scorers = build_scorers(config.rewards, functions) if config.rewards or functions else []
    check_metric_names(config, demands, [scorer.name for scorer in scorers], next(iter(sides.values())))
    evaluated = evaluate_sides(config, sides, readable, scorers)
    metrics = compute_summary(config, evaluated)
    if config.judgements:
        metrics["people"] = people_metrics(config)
    elif config.pairs:
        metrics["pairs"] = write_pairs(config, evaluated["policy"], evaluated["against"], decider(config))
    if demands:
        metrics["gate"] = gate_verdict(demands, metrics)
    write_evaluation(config, metrics, evaluated)
    return metrics


def check_outputs(config: EvaluateConfig, has_gate: bool) -> None:
    """Raises ConfigError, before any model is loaded, for a file that could not be written at the end."""
    require_writable(config.output)
    if config.output and has_gate:
        require_writable(certificate_path(Path(config.output)))
    if config.pairs and config.judgements is None:
        require_writable(config.pairs)
        require_writable(key_path(config.pairs))


def evaluate_sides(
    config: EvaluateConfig, sides: Mapping[str, str], readable: Mapping[str, bool], scorers: Sequence[Scorer]
) -> dict[str, EvaluatedResponses]:
    """Answers and measures of each side. Of the policies only one at a time is in memory."""
    given = config.prompts, config.sampling, config.dtype
    opponents = {"against": load_policy(config.against, *given)} if config.against else {}
    reference = load_reference(config, opponents)
    once = scored_once(scorers)

    def judged_side(side: str, folder: str) -> EvaluatedResponses:
        policy = opponents.get(side) or load_policy(folder, *given)
        if side == next(iter(sides)):  # all sides answer the same prompts
            check_signatures(scorers, [name for prompt in policy.prompts for name in prompt.columns])
            for line in length_warnings(scorers, policy.prompts, config.sampling.max_response_tokens):
                tell(line)
        scoring = partial(score, scorers=once, tokenizer=policy.tokenizer) if scorers else None
        stream = side if side in opponents else "policy"
        with ProgressDisplay(f"evaluate {side}", len(policy.prompts) * config.sampling.num_responses) as display:
            to = reference if readable[side] else None
            found = sample_and_score(policy, to, scoring, config.sampling, config.seed, stream, display.show)
        return add_untempered_kl(found, policy, to, config.sampling, config.seed, stream) if to else found

    return {side: judged_side(side, folder) for side, folder in sides.items()}


def side_paths(config: EvaluateConfig) -> dict[str, str]:
    """Name of each side -> its folder or hub id."""
    if config.checkpoints:
        sides = {side_name(step): folder for step, folder in find_checkpoints(config.checkpoints).items()}
    else:
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
        raise ConfigError(
            "its vocabulary is not that of the policies, so there is no KL",
            where=f"reference {name}",
            fix="name a reference with the policies' tokenizer, or leave it out",
        )
    return same


def load_reference(config: EvaluateConfig, opponents: Mapping[str, EvaluatedPolicy]) -> ActorCritic | None:
    """The model that the KL is measured to, by default the one of `against`; None without either."""
    if config.reference and config.reference != config.against:
        return load_frozen_model(config.reference, config.dtype)
    return opponents["against"].model if opponents else None


def sample_and_score(
    policy: EvaluatedPolicy,
    reference: ActorCritic | None,
    scoring: Scoring | None,
    decoding: DecodingSettings,
    seed: int,
    stream: str,
    show: Callable[[int, dict[str, float]], None] = lambda done, metrics: None,
) -> EvaluatedResponses:
    """Let a player answer all prompts and measure the answers. `stream` names the random numbers it draws."""
    texts: list[str] = []
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for rollouts in policy.sample_responses(decoding, seed, "evaluate", stream):
        texts += rollouts.texts
        for name, values in measure(rollouts, policy, reference, scoring, decoding.temperature or 1.0).items():
            parts[name].append(values.cpu())
        show(len(texts), {"score": float(torch.cat(parts["score"]).nanmean())} if "score" in parts else {})
    k = decoding.num_responses
    measured = {name: torch.cat(values).view(-1, k) for name, values in parts.items()}
    return EvaluatedResponses(policy.prompts, group_texts(texts, k), measured)


def measure(
    rollouts: Rollouts,
    policy: EvaluatedPolicy,
    reference: ActorCritic | None,
    scoring: Scoring | None,
    temperature: float,
) -> dict[str, Tensor]:
    """Name -> [B]: score, each scorer's own, kl (sum of k1), length, truncated, and the sums of PER_TOKEN."""
    measured: dict[str, Tensor] = {}
    if scoring is not None:
        scored = scoring(rollouts)
        measured["score"] = scored.scores
        measured |= {f"rewards/{name}": values for name, values in scored.by_scorer.items()}
        measured |= {f"disagreement/{name}": values for name, values in scored.disagreement.items()}
        measured |= {f"cut/{name}": values for name, values in scored.cut.items()}
    own = analyze_all(policy.model, rollouts, temperature, PASS_TOKENS)
    if reference is not None:
        theirs = reference_logprobs(reference, rollouts, temperature, PASS_TOKENS)
        measured["kl"] = (own.logprobs - theirs).sum(1)
        measured["reference_logprob"] = theirs.sum(1)
    measured["entropy"] = own.entropy.sum(1)
    measured["length"] = rollouts.lengths.double()
    measured["truncated"] = rollouts.truncated.double()
    return {name: values.double() for name, values in measured.items()}


def write_evaluation(
    config: EvaluateConfig, metrics: Mapping[str, Any], evaluated: Mapping[str, EvaluatedResponses]
) -> None:
    """Figures and answers, and beside them the verdict of the gate with what it was a verdict on."""
    if not config.output:
        return
    output = Path(config.output)
    record = {"figures": metrics, "answers": list(_response_rows(evaluated))}
    write_atomic(output, json.dumps(finite(record), ensure_ascii=False, indent=1) + "\n")
    if "gate" in metrics:
        write_atomic(certificate_path(output), json.dumps(finite(certificate(config, metrics)), indent=1) + "\n")


def certificate_path(output: Path) -> Path:
    return output.with_suffix(".gate.json")


def certificate(config: EvaluateConfig, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The gate's verdict, and on what: the SHA-256 of the policy, of what it was compared with, prompts and scorers."""
    files = [*config.policy, config.against, config.reference, config.prompts.path, config.judgements]
    files += [source.model or (source.function or "").rpartition(":")[0] for source in config.rewards]
    return {
        **metrics["gate"],
        "policy": config.policy[0],
        "prompts": metrics["prompts"],
        "settings": config.model_dump(mode="json"),
        "sha256": dict(fingerprints(files)),
        "keel": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _response_rows(evaluated: Mapping[str, EvaluatedResponses]) -> Iterator[dict[str, Any]]:
    """For each prompt the answers of each side with their scores."""
    for row, prompt in enumerate(next(iter(evaluated.values())).prompts):
        responses: dict[str, Any] = {"prompt": prompt.content}
        for side, found in evaluated.items():
            responses[side] = found.texts[row]
            if "score" in found.measured:
                responses[f"{side}_scores"] = found.measured["score"][row].tolist()
        yield responses
