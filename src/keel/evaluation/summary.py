"""Compute the results of `keel evaluate` from evaluated responses, and check the names that it is asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from keel.config import EvaluateConfig, suggestion
from keel.errors import ConfigError
from keel.evaluation.best_of import best_of_curve, equivalent_best_of_n
from keel.evaluation.frontier import compute_frontier, find_checkpoints
from keel.evaluation.gate import Demand, check_demands
from keel.evaluation.judged import EvaluatedResponses, comparison, length_controlled_comparison
from keel.evaluation.pass_rates import pass_rates
from keel.evaluation.slices import slice_rows
from keel.models.prompt_reading import chat_tokenizer, read_prompts

OF_A_POLICY = ("score", "kl", "kl_untempered", "length", "truncated", "entropy", "reference_logprob")
OF_A_COMPARISON = ("win_rate", "length_controlled_win_rate", "length_overlap", "score_difference", "ties")
OF_PEOPLE = (
    "win_rate",
    "length_controlled_win_rate",
    "length_overlap",
    "ties",
    "agreement",
    "judgements",
    "raters",
    "prompts",
)


def compute_summary(config: EvaluateConfig, evaluated: Mapping[str, EvaluatedResponses]) -> dict[str, Any]:
    """Compute the metrics of all prompts and of each slice, the best-of-n curves and the frontier."""
    metrics = compare_sides(config, evaluated) | ({"judge": config.judge} if config.judge else {})
    if config.slices:
        slices = slice_rows(next(iter(evaluated.values())).prompts, config.slices)
        metrics["slices"] = {
            name: compare_sides(config, {side: responses.rows(rows) for side, responses in evaluated.items()})
            for name, rows in slices.items()
        }
    if config.best_of:
        metrics["best_of"] = {side: best_of_curve(responses, config.best_of) for side, responses in evaluated.items()}
        if "against" in evaluated:
            curve = metrics["best_of"]["against"]
            for by_name in metrics_by_policy(metrics).values():
                by_name["worth_best_of"] = equivalent_best_of_n(by_name["score"], curve)
    if config.checkpoints:
        steps = {side_name(step): step for step in find_checkpoints(config.checkpoints)}
        metrics["frontier"] = compute_frontier(steps, evaluated, metrics["policies"], config.seed)
    return metrics


def compare_sides(config: EvaluateConfig, evaluated: Mapping[str, EvaluatedResponses]) -> dict[str, Any]:
    """Compute the metrics of each side, and compare each policy with `against`."""
    against = evaluated.get("against")
    verified = deciding_measurement(config), config.pass_at, config.pass_score
    by_side = {
        side: responses.compute_metrics() | pass_rates(responses, *verified) for side, responses in evaluated.items()
    }
    compared = {
        side: compare(config, responses, against)
        for side, responses in evaluated.items()
        if against and side != "against"
    }
    clusters = next(iter(evaluated.values())).clusters
    metrics: dict[str, Any] = {"prompts": len(clusters.unique())}
    if len(clusters) > metrics["prompts"]:
        metrics["rows"] = len(clusters)
    metrics["responses_per_prompt"] = config.sampling.num_responses
    if len(config.policy) == 1:
        return metrics | by_side | compared.get("policy", {})
    policies = {side: by_side[side] | compared.get(side, {}) for side in by_side if side != "against"}
    return metrics | {"policies": policies} | ({"against": by_side["against"]} if against else {})


def compare(config: EvaluateConfig, ours: EvaluatedResponses, theirs: EvaluatedResponses) -> dict[str, float]:
    """Compare two policies by the deciding scorer; empty without one."""
    measure = deciding_measurement(config)
    if measure not in ours.measured:
        return {}
    raw = comparison(ours.measured[measure], theirs.measured[measure], ours.clusters)
    return raw | length_controlled_comparison(ours, theirs, measure)


def metrics_by_policy(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each evaluated policy by its name."""
    by_policy: dict[str, dict[str, Any]] = metrics.get("policies") or {"policy": metrics["policy"]}
    return by_policy


def deciding_measurement(config: EvaluateConfig) -> str:
    """Return the name of the measurement that decides which of two responses is better."""
    return f"rewards/{config.judge}" if config.judge else "score"


def side_name(step: int) -> str:
    return f"step {step}" if step else "start"


def check_metric_names(config: EvaluateConfig, demands: Sequence[Demand], scorers: Sequence[str], model: str) -> None:
    """Check the names of scorers, metrics and slices before any response is sampled. Raises ConfigError."""
    if config.judge is not None and config.judge not in scorers:
        raise ConfigError(f"no scorer is called {config.judge!r}; {suggestion(config.judge, list(scorers))}", "judge")
    if config.pass_at and not scorers:
        raise ConfigError("pass_at needs a scorer to verify responses", "pass_at", "name a scorer in rewards")
    if config.best_of and not scorers:
        raise ConfigError("best_of needs a scorer to choose the best response", "best_of", "name a scorer in rewards")
    slices: dict[str, list[int]] = {}
    if config.slices:
        prompts = read_prompts(config.prompt_settings, chat_tokenizer(model, config.prompt_settings), quiet=True)
        slices = slice_rows(prompts, config.slices)
    rates = [f"pass@{k}" for k in config.pass_at] + [f"avg@{config.sampling.num_responses}"] * bool(config.pass_at)
    check_demands(demands, [*known_metrics(scorers), *rates], list(slices))


def known_metrics(scorers: Sequence[str]) -> list[str]:
    """Return the names of the metrics that a gate can use."""
    by_scorer = [f"rewards/{name}" for name in scorers] + [f"disagreement/{name}" for name in scorers]
    return ["prompts", *OF_A_POLICY, *OF_A_COMPARISON, *by_scorer, *(f"people.{name}" for name in OF_PEOPLE)]
