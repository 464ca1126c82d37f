"""All that `keel evaluate` returns, from judged answers; and, before there are any, whether it can be."""

from collections.abc import Mapping, Sequence
from typing import Any

from keel.config import EvaluateConfig, nearest
from keel.errors import ConfigError
from keel.evaluation.best_of import best_of_curve, equivalent_best_of_n
from keel.evaluation.frontier import compute_frontier, find_checkpoints
from keel.evaluation.gate import Demand, check_demands
from keel.evaluation.judged import EvaluatedResponses, comparison, length_controlled_comparison
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
    """Figures of all prompts, of each slice of them, the best-of-n curves and the frontier."""
    metrics = compare_sides(config, evaluated) | ({"judge": config.judge} if config.judge else {})
    if config.slices:
        slices = slice_rows(next(iter(evaluated.values())).prompts, config.slices)
        metrics["slices"] = {
            name: compare_sides(config, {side: responses.rows(rows) for side, responses in evaluated.items()})
            for name, rows in slices.items()
        }
    if config.best_of:
        metrics["best_of"] = {side: best_of_curve(own, config.best_of) for side, own in evaluated.items()}
        if "against" in evaluated:
            curve = metrics["best_of"]["against"]
            for own in metrics_by_policy(metrics).values():
                own["worth_best_of"] = equivalent_best_of_n(own["score"], curve)
    if config.checkpoints:
        steps = {side_name(step): step for step in find_checkpoints(config.checkpoints)}
        metrics["frontier"] = compute_frontier(steps, evaluated, metrics["policies"], config.seed)
    return metrics


def compare_sides(config: EvaluateConfig, evaluated: Mapping[str, EvaluatedResponses]) -> dict[str, Any]:
    """Figures of each side, and of each policy against the other."""
    against = evaluated.get("against")
    found = {side: responses.compute_metrics() for side, responses in evaluated.items()}
    compared = {side: compare(config, own, against) for side, own in evaluated.items() if against and side != "against"}
    clusters = next(iter(evaluated.values())).clusters
    metrics: dict[str, Any] = {"prompts": len(clusters.unique())}
    if len(clusters) > metrics["prompts"]:
        metrics["rows"] = len(clusters)
    metrics["responses_per_prompt"] = config.sampling.num_responses
    if len(config.policy) == 1:
        return metrics | found | compared.get("policy", {})
    policies = {side: found[side] | compared.get(side, {}) for side in found if side != "against"}
    return metrics | {"policies": policies} | ({"against": found["against"]} if against else {})


def compare(config: EvaluateConfig, ours: EvaluatedResponses, theirs: EvaluatedResponses) -> dict[str, float]:
    """By the scorer that decides; empty without one."""
    measure = decider(config)
    if measure not in ours.measured:
        return {}
    raw = comparison(ours.measured[measure], theirs.measured[measure], ours.clusters)
    return raw | length_controlled_comparison(ours, theirs, measure)


def metrics_by_policy(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> figures of each policy that is judged."""
    found: dict[str, dict[str, Any]] = metrics.get("policies") or {"policy": metrics["policy"]}
    return found


def decider(config: EvaluateConfig) -> str:
    """The measure that says which of two answers is better."""
    return f"rewards/{config.judge}" if config.judge else "score"


def side_name(step: int) -> str:
    return f"step {step}" if step else "start"


def check_metric_names(config: EvaluateConfig, demands: Sequence[Demand], scorers: Sequence[str], model: str) -> None:
    """Raises ConfigError for a scorer, a figure or a slice that there is not, before any answer is sampled."""
    if config.judge is not None and config.judge not in scorers:
        raise ConfigError(f"no scorer is called {config.judge!r}; {nearest(config.judge, list(scorers))}", "judge")
    if config.best_of and not scorers:
        raise ConfigError("without a scorer no answer is best", "best_of", "name one under rewards")
    slices: dict[str, list[int]] = {}
    if config.slices:
        prompts = read_prompts(config.prompts, chat_tokenizer(model, config.prompts), quiet=True)
        slices = slice_rows(prompts, config.slices)
    check_demands(demands, known_metrics(scorers), list(slices))


def known_metrics(scorers: Sequence[str]) -> list[str]:
    """What a gate may ask for."""
    by_scorer = [f"rewards/{name}" for name in scorers] + [f"disagreement/{name}" for name in scorers]
    return ["prompts", *OF_A_POLICY, *OF_A_COMPARISON, *by_scorer, *(f"people.{name}" for name in OF_PEOPLE)]
