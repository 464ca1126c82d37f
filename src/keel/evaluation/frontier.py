"""Score against KL over the checkpoints of a run: where the policy went, and whether it went too far."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keel.config import EvaluateConfig, TrainConfig, parse
from keel.errors import ConfigError
from keel.evaluation.judged import EvaluatedResponses, by_prompt, resamples
from keel.run.folder import RunFolder
from keel.run.read.run import read_metrics
from keel.stats.overoptimisation import Fit, fit_overoptimisation

REFITS = 500
SURE = 0.95
NO_WAY = 0.01  # nats; a peak that near is the start


def settings_of_run(path: str) -> TrainConfig:
    """Raises ConfigError for a folder that holds no run of `keel train`."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ConfigError(
            "this folder holds no run (no config.yaml)", where=path, fix="name the folder that keel train wrote"
        )
    saved = folder.settings()
    if "rollout" not in saved:
        raise ConfigError("this is no run of keel train", where=path, fix="name the folder that keel train wrote")
    return parse(TrainConfig, saved, where=str(folder.config))


def complete_config(config: EvaluateConfig) -> EvaluateConfig:
    """With `checkpoints`, whatever is not given as the run had it. Raises ConfigError."""
    if config.checkpoints is None:
        return config
    run = settings_of_run(config.checkpoints)
    given = {name: getattr(config.sampling, name) for name in config.sampling.model_fields_set}
    names = ("max_response_tokens", "temperature", "stop", "stop_in_text")
    own = {name: getattr(run.rollout, name) for name in names}
    changes = {
        "rewards": config.rewards or run.rewards,
        "reference": config.reference or run.reference or run.policy.model,
        "sampling": config.sampling.model_copy(update=own | given),
    }
    return config.model_copy(update=changes)


def find_checkpoints(path: str) -> dict[int, str]:
    """Step -> the policy's folder, the start (step 0) first and the result last, which stands for its checkpoint."""
    folder, run = RunFolder(path), settings_of_run(path)
    found = {0: run.policy.model}
    for checkpoint in sorted(folder.checkpoints.glob("step-*")):
        named = re.fullmatch(r"step-(\d+)", checkpoint.name)
        if named and (checkpoint / "policy").is_dir():
            found[int(named[1])] = str(checkpoint / "policy")
    if folder.policy.is_dir():
        lines = read_metrics(folder.metrics)
        found[int(lines[-1]["step"]) if lines else run.steps] = str(folder.policy)
    if len(found) < 2:
        raise ConfigError(
            "there is no checkpoint to judge", where=path, fix="let the run reach a checkpoint (checkpoint.every)"
        )
    return dict(sorted(found.items()))


def compute_frontier(
    steps: Mapping[str, int],
    evaluated: Mapping[str, EvaluatedResponses],
    metrics: Mapping[str, Mapping[str, float]],
    seed: int,
) -> dict[str, Any]:
    """Points by step, and for the score and each scorer the form of Gao et al. that fits them, where there are four.

    `steps`: side -> step. All sides answered the same prompts.
    """
    sides = [evaluated[side] for side in steps]
    names = [name for name in sides[0].measured if name == "score" or name.startswith("rewards/")]
    shown = [f"{name}{end}" for name in ("kl", *names) for end in ("", "_low", "_high")]
    points = [{"step": step, **{name: metrics[side][name] for name in shown}} for side, step in steps.items()]
    return {"points": points, "fits": {name: fit_frontier(sides, name, seed) for name in names}}


def fit_frontier(sides: Sequence[EvaluatedResponses], name: str, seed: int) -> dict[str, Any] | None:
    """The fit, where 95% of the resamples of the prompts have the peak, and the share that has it behind the last side.

    None with too few points. Only prompts count of which every side has a figure.
    """
    table = torch.stack([side.measured[each].nanmean(1) for each in ("kl", name) for side in sides], 1)
    known = table.isfinite().all(1)
    clusters, table = sides[0].clusters[known.cpu()], table[known]
    kl, scores = table.mean(0).view(2, -1).numpy() if len(table) else np.zeros((2, 0))
    found = fit_overoptimisation(kl, scores)
    if found is None:
        return None
    again = refits(table, clusters, seed)
    peaks = [peak_kl(other, last) for other, last in again]
    low, high = (float(end) for end in np.quantile(peaks, [0.025, 0.975], method="nearest"))
    behind = float(np.mean([other.is_behind(last) for other, last in again]))
    says = peak_verdict(found, (low, high), float(kl[-1]), behind)
    return {**vars(found), "peak_kl_low": low, "peak_kl_high": high, "behind": behind, "says": says}


def refits(table: Tensor, clusters: Tensor, seed: int) -> list[tuple[Fit, float]]:
    """The fit to each resample of the prompts, with the last side's KL in it.

    `table` [N, KLs and scores of the sides]; `clusters` [N] is the number of each row's prompt.
    """
    numbers = clusters.unique(return_inverse=True)[1]
    rows = torch.cat([table.cpu(), torch.ones(len(table), 1, dtype=table.dtype)], 1)
    by_cluster = by_prompt(rows, numbers)
    sums = torch.cat([times @ by_cluster for times in resamples(len(by_cluster), seed, REFITS)])
    halves = (sums[:, :-1] / sums[:, -1:]).view(len(sums), 2, -1).numpy()
    found = [(fit_overoptimisation(kl, scores), float(kl[-1])) for kl, scores in halves]
    return [(other, last) for other, last in found if other is not None]


def peak_kl(found: Fit, last_kl: float) -> float:
    """The KL of the highest point: 0 where the score falls from the start to the last side, inf where it has none."""
    if found.peak_kl is None:
        return 0.0 if found.is_behind(last_kl) else np.inf
    return found.peak_kl


def peak_verdict(found: Fit, ends: tuple[float, float], last_kl: float, behind: float) -> str:
    """In words: whether the peak is behind the result, where that can be said."""
    if last_kl <= 0:
        return "nothing to say: the result is where the start is"
    if 1 - SURE < behind < SURE:
        return f"too close to say whether the peak is behind: {behind:.0%} of the resamples have it behind"
    peak = peak_kl(found, last_kl)
    if behind >= SURE and peak < NO_WAY:
        return "past its peak, which is the start: the score falls as the KL rises"
    if peak == np.inf and found.predict(last_kl) < found.start:
        return f"no peak: the score fell at first and rises again, and at KL {last_kl:.3g} is still below the start"
    if peak == np.inf:
        return "no peak: the score rises as the KL does"
    where = f"the peak is at KL {peak:.3g} [{ends[0]:.3g}, {ends[1]:.3g}], the result at {last_kl:.3g}"
    return f"past its peak: {where}" if behind >= SURE else f"before its peak: {where}"
