"""All that `keel evaluate` returns, from judged answers; and, before there are any, whether it can be."""

from collections.abc import Mapping, Sequence
from typing import Any

from keel.config import EvaluateConfig, nearest
from keel.errors import ConfigError
from keel.evaluation.best_of import best_of_curve, worth_best_of
from keel.evaluation.frontier import checkpoints_of, frontier
from keel.evaluation.gate import Demand, check_demands
from keel.evaluation.judged import Judged, comparison, length_controlled_comparison
from keel.evaluation.slices import slices_of
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


def figures_of(config: EvaluateConfig, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Figures of all prompts, of each slice of them, the best-of-n curves and the frontier."""
    figures = side_by_side(config, judged) | ({"judge": config.judge} if config.judge else {})
    if config.slices:
        slices = slices_of(next(iter(judged.values())).prompts, config.slices)
        figures["slices"] = {
            name: side_by_side(config, {side: answers.rows(rows) for side, answers in judged.items()})
            for name, rows in slices.items()
        }
    if config.best_of:
        figures["best_of"] = {side: best_of_curve(own, config.best_of) for side, own in judged.items()}
        if "against" in judged:
            curve = figures["best_of"]["against"]
            for own in policies_of(figures).values():
                own["worth_best_of"] = worth_best_of(own["score"], curve)
    if config.checkpoints:
        steps = {side_of(step): step for step in checkpoints_of(config.checkpoints)}
        figures["frontier"] = frontier(steps, judged, figures["policies"], config.seed)
    return figures


def side_by_side(config: EvaluateConfig, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Figures of each side, and of each policy against the other."""
    against = judged.get("against")
    found = {side: answers.figures() for side, answers in judged.items()}
    compared = {side: compare(config, own, against) for side, own in judged.items() if against and side != "against"}
    clusters = next(iter(judged.values())).clusters
    figures: dict[str, Any] = {"prompts": len(clusters.unique())}
    if len(clusters) > figures["prompts"]:
        figures["rows"] = len(clusters)
    figures["responses_per_prompt"] = config.sampling.num_responses
    if len(config.policy) == 1:
        return figures | found | compared.get("policy", {})
    policies = {side: found[side] | compared.get(side, {}) for side in found if side != "against"}
    return figures | {"policies": policies} | ({"against": found["against"]} if against else {})


def compare(config: EvaluateConfig, ours: Judged, theirs: Judged) -> dict[str, float]:
    """By the scorer that decides; empty without one."""
    measure = decider(config)
    if measure not in ours.measured:
        return {}
    raw = comparison(ours.measured[measure], theirs.measured[measure], ours.clusters)
    return raw | length_controlled_comparison(ours, theirs, measure)


def policies_of(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> figures of each policy that is judged."""
    found: dict[str, dict[str, Any]] = figures.get("policies") or {"policy": figures["policy"]}
    return found


def decider(config: EvaluateConfig) -> str:
    """The measure that says which of two answers is better."""
    return f"rewards/{config.judge}" if config.judge else "score"


def side_of(step: int) -> str:
    return f"step {step}" if step else "start"


def check_names(config: EvaluateConfig, demands: Sequence[Demand], scorers: Sequence[str], model: str) -> None:
    """Raises ConfigError for a scorer, a figure or a slice that there is not, before any answer is sampled."""
    if config.judge is not None and config.judge not in scorers:
        raise ConfigError(f"no scorer is called {config.judge!r}; {nearest(config.judge, list(scorers))}", "judge")
    if config.best_of and not scorers:
        raise ConfigError("without a scorer no answer is best", "best_of", "name one under rewards")
    slices: dict[str, list[int]] = {}
    if config.slices:
        prompts = read_prompts(config.prompts, chat_tokenizer(model, config.prompts), quiet=True)
        slices = slices_of(prompts, config.slices)
    check_demands(demands, known_figures(scorers), list(slices))


def known_figures(scorers: Sequence[str]) -> list[str]:
    """What a gate may ask for."""
    by_scorer = [f"rewards/{name}" for name in scorers] + [f"disagreement/{name}" for name in scorers]
    return ["prompts", *OF_A_POLICY, *OF_A_COMPARISON, *by_scorer, *(f"people.{name}" for name in OF_PEOPLE)]
