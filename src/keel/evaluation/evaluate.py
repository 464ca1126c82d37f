"""Evaluate policies on prompts, alone and against another policy (`keel evaluate`)."""

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
from keel.data.prompts import Prompt
from keel.evaluation.endpoint import EndpointPolicy, EndpointRollouts, reading_model
from keel.evaluation.engine import sampled_by_engine
from keel.evaluation.evaluated_policy import PASS_TOKENS, EvaluatedPolicy
from keel.evaluation.frontier import complete_config
from keel.evaluation.gate import Demand, gate_verdict, read_gate
from keel.evaluation.harness import check_tasks, evaluate_tasks
from keel.evaluation.judged import EvaluatedResponses
from keel.evaluation.people import check_pairs, key_path, people_metrics, write_pairs
from keel.evaluation.sample import (
    Show,
    group_texts,
    share_progress,
)
from keel.evaluation.score_once import scored_once
from keel.evaluation.sides import check_vocabularies, load_reference, load_side, side_paths
from keel.evaluation.summary import check_metric_names, compute_summary, deciding_measurement
from keel.evaluation.untempered_kl import add_untempered_kl
from keel.judge.judge import USAGE
from keel.learn.targets import analyze_all, reference_logprobs
from keel.models.actor_critic import ActorCritic
from keel.models.prompt_reading import print_remarks
from keel.rollout.judge_scorer import JudgeScorer, refuse_comparisons
from keel.rollout.lengths import length_warnings
from keel.rollout.score import score
from keel.rollout.scorers import Scorer, build_scorers, check_signatures
from keel.run.folder import write_atomic
from keel.run.json_values import replace_non_finite
from keel.run.origin import fingerprints
from keel.run.output import require_writable
from keel.world import ALONE, World, lost_process_reported, raise_together

Scoring = Callable[[Rollouts], ScoredRollouts]


def evaluate_policies(config: EvaluateConfig, functions: Sequence[Callable[..., Any]] = ()) -> dict[str, Any]:
    """Evaluate policies, return the metrics and write them to `config.output`.

    Args:
        functions: Python reward functions in addition to `config.rewards`.

    Returns the metrics of one policy under "policy", and those of its comparison on the top level. Several policies
    have both under "policies", by their short names; each has the metrics that it would have alone. "against" has those
    of the policy they are compared with. NAME_low and NAME_high are the ends of the 95% interval over prompts. The
    optional parts are "slices", "best_of", "frontier", "people", "pairs" and "gate".

    Raises ConfigError, DataError or RewardError.
    """
    world = World.from_environment()
    with lost_process_reported():
        config = raise_together(world, partial(complete_config, config))
        sides = world.from_main(partial(_check_files, config))
        world.from_main(partial(check_tasks, config, sides, world.size))
        if config.prompts is None:
            return _evaluate_tasks_alone(config, sides)
        readable = raise_together(world, partial(check_vocabularies, config, sides))
        scorers = world.in_turn(lambda: build_scorers(config.rewards, functions) if config.rewards or functions else [])
        refuse_comparisons(scorers, "rewards")
        world.from_main(partial(_check_names, config, scorers, sides))
        evaluated = evaluate_sides(config, sides, readable, scorers, world)
        usage = judge_usage(scorers, world)
        return dict(world.from_main(partial(_summarize, config, evaluated, usage, sides)))


def _evaluate_tasks_alone(config: EvaluateConfig, sides: Mapping[str, str]) -> dict[str, Any]:
    """Evaluate the policies on tasks, without prompts, and write the results."""
    metrics = {"tasks": {side: evaluate_tasks(config, folder) for side, folder in sides.items()}}
    write_evaluation(config, metrics, {})
    return metrics


def _check_files(config: EvaluateConfig) -> dict[str, str]:
    """Check the gate and the files to write, and return the folder of each side. Raises ConfigError."""
    demands = _demands(config)
    check_pairs(config)
    check_outputs(config, bool(demands))
    return side_paths(config)


def _check_names(config: EvaluateConfig, scorers: Sequence[Scorer], sides: Mapping[str, str]) -> None:
    names = [scorer.name for scorer in scorers]
    check_metric_names(
        config, _demands(config), names, reading_model([config.tokenizer, *sides.values(), config.reference])
    )


def _demands(config: EvaluateConfig) -> list[Demand]:
    return read_gate(config.gate) if config.gate is not None else []


def judge_usage(scorers: Sequence[Scorer], world: World) -> dict[str, dict[str, float]]:
    """Return what each judge was asked and its cost, over all processes, by the name of the scorer."""
    judges = {scorer.name: scorer.judge for scorer in scorers if isinstance(scorer, JudgeScorer)}
    shares = world.gather_values([[*vars(judge.take_usage()).values()] for judge in judges.values()])
    totals = [[sum(values) for values in zip(*each, strict=True)] for each in zip(*shares, strict=True)]
    return {name: dict(zip(USAGE, total, strict=True)) for name, total in zip(judges, totals, strict=True)}


def _summarize(
    config: EvaluateConfig,
    evaluated: Mapping[str, EvaluatedResponses],
    usage: Mapping[str, Mapping[str, float]],
    sides: Mapping[str, str],
) -> dict[str, Any]:
    """Compute and write the metrics of all sides, with the optional parts."""
    metrics = compute_summary(config, evaluated) | ({"judges": dict(usage)} if usage else {})
    if config.judgements:
        metrics["people"] = people_metrics(config)
    elif config.pairs:
        metrics["pairs"] = write_pairs(config, evaluated["policy"], evaluated["against"], deciding_measurement(config))
    if config.tasks:
        metrics["tasks"] = {side: evaluate_tasks(config, folder) for side, folder in sides.items()}
    if demands := _demands(config):
        metrics["gate"] = gate_verdict(demands, metrics)
    write_evaluation(config, metrics, evaluated)
    return metrics


def check_outputs(config: EvaluateConfig, has_gate: bool) -> None:
    """Check that every output file can be written, before any model is loaded. Raises ConfigError."""
    require_writable(config.output)
    if config.output and has_gate:
        require_writable(certificate_path(Path(config.output)))
    if config.pairs and config.judgements is None:
        require_writable(config.pairs)
        require_writable(key_path(config.pairs))


def evaluate_sides(
    config: EvaluateConfig,
    sides: Mapping[str, str],
    readable: Mapping[str, bool],
    scorers: Sequence[Scorer],
    world: World,
) -> dict[str, EvaluatedResponses]:
    """Sample and measure the responses of each side.

    Only `against`, the reference and one policy are in memory at a time.
    """
    load = partial(load_side, config, sides, world)
    opponents = {"against": load(config.against)} if config.against else {}
    reference = load_reference(config, opponents, world)
    once = scored_once(scorers)

    def evaluate_side(side: str, folder: str) -> EvaluatedResponses:
        loaded = opponents.get(side) or load(folder)
        if isinstance(loaded, EndpointPolicy):
            return measure_side(side, loaded)
        with sampled_by_engine(loaded, config, world) as policy:
            return measure_side(side, policy)

    def measure_side(side: str, policy: EvaluatedPolicy | EndpointPolicy) -> EvaluatedResponses:
        if side == next(iter(sides)):  # all sides have the same prompts, so one check is enough
            check_signatures(scorers, [name for prompt in policy.prompts for name in prompt.columns])
            print_remarks(length_warnings(scorers, policy.prompts, config.sampling.max_response_tokens))
        scoring = partial(score, scorers=once, tokenizer=policy.tokenizer) if scorers else None
        # All policies draw the same random numbers, so that each gets the responses that it would get alone.
        stream = side if side in opponents else "policy"
        to = reference if readable[side] else None
        with share_progress(f"evaluate {side}", len(policy.prompts), config.sampling.num_responses, world) as show:
            responses = sample_and_score(policy, to, scoring, config.sampling, config.seed, stream, world, show)
        if to is None or isinstance(policy, EndpointPolicy):
            return responses
        return add_untempered_kl(responses, policy, to, config.sampling, config.seed, stream, world)

    return {side: evaluate_side(side, folder) for side, folder in sides.items()}


def sample_and_score(
    policy: EvaluatedPolicy | EndpointPolicy,
    reference: ActorCritic | None,
    scoring: Scoring | None,
    decoding: DecodingSettings,
    seed: int,
    stream: str,
    world: World = ALONE,
    show: Show = lambda done, metrics: None,
) -> EvaluatedResponses:
    """Sample responses to all prompts of the policy and measure them.

    Args:
        stream: name of the stream of random numbers.
        world: processes that call this together. Each handles a share of the prompts; all get all results.
        show: called after each batch with the number of responses and the mean score of this process so far.
    """
    measured = raise_together(
        world, partial(_measure_share, policy, reference, scoring, decoding, seed, stream, world, show)
    )
    return gather_responses(measured, policy.prompts, world)


def _measure_share(
    policy: EvaluatedPolicy | EndpointPolicy,
    reference: ActorCritic | None,
    scoring: Scoring | None,
    decoding: DecodingSettings,
    seed: int,
    stream: str,
    world: World,
    show: Show,
) -> EvaluatedResponses:
    """Sample and measure the responses to this process's share of the prompts."""
    texts: list[str] = []
    batches: dict[str, list[Tensor]] = defaultdict(list)
    for rollouts in policy.sample_responses(decoding, seed, "evaluate", stream, world=world):
        texts += rollouts.texts
        for name, values in measure_responses(
            rollouts, policy, reference, scoring, decoding.temperature or 1.0
        ).items():
            batches[name].append(values.cpu())
        show(len(texts), {"score": float(torch.cat(batches["score"]).nanmean())} if "score" in batches else {})
    k = decoding.num_responses
    measured = {name: torch.cat(values).view(-1, k) for name, values in batches.items()}
    return EvaluatedResponses(policy.prompts[world.share(len(policy.prompts))], group_texts(texts, k), measured)


def gather_responses(share: EvaluatedResponses, prompts: list[Prompt], world: World) -> EvaluatedResponses:
    """Join the responses of all processes, in the order of the prompts. Every process must call it."""
    if world.size == 1:
        return share
    shares = world.gather_values([share.texts, {name: values.tolist() for name, values in share.measured.items()}])
    texts = [texts for texts_of_share, _ in shares for texts in texts_of_share]
    names = {name: None for _, measured in shares for name in measured}  # of a process without prompts: none
    measured = {
        name: torch.tensor([row for _, part in shares for row in part.get(name, [])], dtype=torch.float64)
        for name in names
    }
    return EvaluatedResponses(prompts, texts, measured)


def measure_responses(
    rollouts: Rollouts,
    policy: EvaluatedPolicy | EndpointPolicy,
    reference: ActorCritic | None,
    scoring: Scoring | None,
    temperature: float,
) -> dict[str, Tensor]:
    """Measure each response. Return [B] by name.

    `kl` is the sum over tokens of log pi - log pi_ref (k1). The names in PER_TOKEN are sums over tokens, too.
    """
    measured: dict[str, Tensor] = {}
    if scoring is not None:
        scored = scoring(rollouts)
        measured["score"] = scored.scores
        measured |= {f"rewards/{name}": values for name, values in scored.by_scorer.items()}
        measured |= {f"disagreement/{name}": values for name, values in scored.disagreement.items()}
        measured |= {f"cut/{name}": values for name, values in scored.cut.items()}
    if isinstance(policy, EvaluatedPolicy):
        analysis = analyze_all(policy.model, rollouts, temperature, PASS_TOKENS, with_values=False)
        if reference is not None:
            ref_logprobs = reference_logprobs(reference, rollouts, temperature, PASS_TOKENS)
            measured["kl"] = (analysis.logprobs - ref_logprobs).sum(1)
            measured["reference_logprob"] = ref_logprobs.sum(1)
        measured["entropy"] = analysis.entropy.sum(1)
    measured["length"] = rollouts.num_tokens if isinstance(rollouts, EndpointRollouts) else rollouts.lengths.double()
    measured["truncated"] = rollouts.truncated.double()
    return {name: values.double() for name, values in measured.items()}


def write_evaluation(
    config: EvaluateConfig, metrics: Mapping[str, Any], evaluated: Mapping[str, EvaluatedResponses]
) -> None:
    """Write metrics and responses to `config.output`, and the certificate of the gate beside it."""
    if not config.output:
        return
    output = Path(config.output)
    record = {"figures": metrics, "answers": list(_response_rows(evaluated))}
    write_atomic(output, json.dumps(replace_non_finite(record), ensure_ascii=False, indent=1) + "\n")
    if "gate" in metrics:
        write_atomic(
            certificate_path(output), json.dumps(replace_non_finite(certificate(config, metrics)), indent=1) + "\n"
        )


def certificate_path(output: Path) -> Path:
    return output.with_suffix(".gate.json")


def certificate(config: EvaluateConfig, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the gate's verdict with the settings and the SHA-256 of policies, prompts, rankings and scorers."""
    files = [*config.policy, config.against, config.reference, config.prompt_settings.path, config.judgements]
    files += [source.judge.rubric for source in config.rewards if source.judge]
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
    """Yield the responses of each side to each prompt, with their scores."""
    prompts = next((responses.prompts for responses in evaluated.values()), [])
    for number, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": prompt.content}
        for side, responses in evaluated.items():
            row[side] = responses.texts[number]
            if "score" in responses.measured:
                row[f"{side}_scores"] = responses.measured["score"][number].tolist()
        yield row
