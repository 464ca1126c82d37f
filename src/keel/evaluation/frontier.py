"""Score against KL over the checkpoints of a run, and whether the score is past its peak."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keel.config import EvaluateConfig, TrainConfig, parse
from keel.errors import ConfigError
from keel.evaluation.judged import EvaluatedResponses, sum_by_prompt
from keel.run.folder import RunFolder
from keel.run.read.run import read_metrics
from keel.stats.overoptimisation import OveroptimisationFit, fit_overoptimisation
from keel.world import generator

REFITS = 500  # bootstrap samples of the prompts
SURE = 0.95  # share of the refits that must agree
NO_WAY = 0.01  # nats; a peak at a smaller KL counts as the start
AT_ONCE = 2**22  # numbers in memory while resampling; no result depends on it


def settings_of_run(path: str) -> TrainConfig:
    """Read the settings of a run. Raises ConfigError for a folder without a run of `keel train`."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ConfigError(
            "this folder holds no run (no config.yaml)", where=path, fix="name a folder that keel train wrote"
        )
    saved = folder.settings()
    if "rollout" not in saved:
        raise ConfigError("this is not a run of keel train", where=path, fix="name a folder that keel train wrote")
    return parse(TrainConfig, saved, where=str(folder.config))


def complete_config(config: EvaluateConfig) -> EvaluateConfig:
    """With `checkpoints`, take the settings that are not set from the run. Raises ConfigError."""
    if config.checkpoints is None:
        return config
    run = settings_of_run(config.checkpoints)
    explicit = {name: getattr(config.sampling, name) for name in config.sampling.model_fields_set}
    names = ("max_response_tokens", "temperature", "stop", "stop_in_text")
    of_run = {name: getattr(run.rollout, name) for name in names}
    changes = {
        "rewards": config.rewards or run.rewards,
        "reference": config.reference or run.reference or run.policy.model,
        "sampling": config.sampling.model_copy(update=of_run | explicit),
    }
    return config.model_copy(update=changes)


def find_checkpoints(path: str) -> dict[int, str]:
    """Return the policy's folder for each saved step, from the start (step 0) to the result of the run.

    The result replaces the checkpoint of its step. Raises ConfigError for a run without any.
    """
    folder, run = RunFolder(path), settings_of_run(path)
    policies = {0: run.policy.model}
    for checkpoint in sorted(folder.checkpoints.glob("step-*")):
        named = re.fullmatch(r"step-(\d+)", checkpoint.name)
        if named and (checkpoint / "policy").is_dir():
            policies[int(named[1])] = str(checkpoint / "policy")
    if folder.policy.is_dir():
        lines = read_metrics(folder.metrics)
        policies[int(lines[-1]["step"]) if lines else run.steps] = str(folder.policy)
    if len(policies) < 2:
        raise ConfigError(
            "there is no checkpoint to evaluate", where=path, fix="let the run reach a checkpoint (checkpoint.every)"
        )
    return dict(sorted(policies.items()))


def compute_frontier(
    steps: Mapping[str, int],
    evaluated: Mapping[str, EvaluatedResponses],
    metrics: Mapping[str, Mapping[str, float]],
    seed: int,
) -> dict[str, Any]:
    """Return one point a step, and the fit of Gao et al. for the score and each scorer.

    Args:
        steps: step of each side. All sides must have the same prompts.
    """
    sides = [evaluated[side] for side in steps]
    names = [name for name in sides[0].measured if name == "score" or name.startswith("rewards/")]
    shown = [f"{name}{end}" for name in ("kl", *names) for end in ("", "_low", "_high")]
    points = [{"step": step, **{name: metrics[side][name] for name in shown}} for side, step in steps.items()]
    return {"points": points, "fits": {name: fit_frontier(sides, name, seed) for name in names}}


def fit_frontier(sides: Sequence[EvaluatedResponses], name: str, seed: int) -> dict[str, Any] | None:
    """Fit the score to the KL over the sides. Return None with too few points.

    The result has the interval of the peak over resamples of the prompts, and as `behind` the share of resamples in
    which the last side is past the peak. Prompts for which a side has no value are left out.
    """
    table = torch.stack([side.measured[each].nanmean(1) for each in ("kl", name) for side in sides], 1)
    known = table.isfinite().all(1)
    clusters, table = sides[0].clusters[known.cpu()], table[known]
    kl, scores = table.mean(0).view(2, -1).numpy() if len(table) else np.zeros((2, 0))
    fit = fit_overoptimisation(kl, scores)
    if fit is None:
        return None
    resampled = refits(table, clusters, seed)
    peaks = [peak_kl(refit, last) for refit, last in resampled]
    # "nearest": a peak may be infinite, and interpolation between infinities is NaN.
    low, high = (float(end) for end in np.quantile(peaks, [0.025, 0.975], method="nearest"))
    behind = float(np.mean([refit.is_behind(last) for refit, last in resampled]))
    verdict = describe_peak(fit, (low, high), float(kl[-1]), behind)
    return {**vars(fit), "peak_kl_low": low, "peak_kl_high": high, "behind": behind, "says": verdict}


def refits(table: Tensor, clusters: Tensor, seed: int) -> list[tuple[OveroptimisationFit, float]]:
    """Fit each bootstrap sample of the prompts. Return the fits, each with the KL of the last side in its sample.

    Args:
        table: [N, 2 S], the KL of each of the S sides, then the score of each.
        clusters: [N], number of each row's prompt.
    """
    numbers = clusters.unique(return_inverse=True)[1]
    rows = torch.cat([table.cpu(), torch.ones(len(table), 1, dtype=table.dtype)], 1)  # the ones count the rows
    by_cluster = sum_by_prompt(rows, numbers)
    sums = torch.cat([counts @ by_cluster for counts in resamples(len(by_cluster), seed, REFITS)])
    means = (sums[:, :-1] / sums[:, -1:]).view(len(sums), 2, -1).numpy()
    fits = [(fit_overoptimisation(kl, scores), float(kl[-1])) for kl, scores in means]
    return [(fit, last) for fit, last in fits if fit is not None]


def resamples(count: int, seed: int, draws: int) -> Iterator[Tensor]:
    """Yield how often each of `count` prompts is in each of `draws` samples with replacement, in blocks [-1, count].

    torch's generator draws them, not `stats.bootstrap`: another stream would change intervals already reported.
    """
    numbers = generator(seed, "bootstrap")
    at_once = max(1, AT_ONCE // count)
    for start in range(0, draws, at_once):
        drawn = torch.randint(count, (min(at_once, draws - start), count), generator=numbers)
        yield torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(()).expand(drawn.shape).double()
        )


def peak_kl(fit: OveroptimisationFit, last_kl: float) -> float:
    """Return the KL of the peak: 0 if the score falls from the start to the last side, inf if there is no peak."""
    if fit.peak_kl is None:
        return 0.0 if fit.is_behind(last_kl) else np.inf
    return fit.peak_kl


def describe_peak(fit: OveroptimisationFit, ends: tuple[float, float], last_kl: float, behind: float) -> str:
    """Describe in one line whether the result is past the peak.

    Args:
        ends: interval of the peak's KL.
        last_kl: KL of the result.
        behind: share of the resamples in which the result is past the peak.
    """
    if last_kl <= 0:
        return "no verdict: the KL of the result is 0"
    if 1 - SURE < behind < SURE:
        return f"too close to say whether the peak is behind: {behind:.0%} of the resamples have it behind"
    peak = peak_kl(fit, last_kl)
    if behind >= SURE and peak < NO_WAY:
        return "past its peak, which is the start: the score falls as the KL rises"
    if peak == np.inf and fit.predict(last_kl) < fit.start:
        return f"no peak: the score fell at first and rises again, and at KL {last_kl:.3g} is still below the start"
    if peak == np.inf:
        return "no peak: the score rises as the KL does"
    where = f"the peak is at KL {peak:.3g} [{ends[0]:.3g}, {ends[1]:.3g}], the result at {last_kl:.3g}"
    return f"past its peak: {where}" if behind >= SURE else f"before its peak: {where}"
