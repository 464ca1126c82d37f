"""Changes of settings that causes propose, in the scale of the run's scores."""

import numpy as np

from keel.algorithms import ALGORITHM_TRAITS, DEFAULT_DEVIATION_SETTING
from keel.diagnosis.findings import Change
from keel.run.read.run import Run, Series
from keel.run.read.series import highest, last, trailing_mean, window

USUAL_KL = 0.05  # kl_coef over the scores' deviation; 0.01 to 0.2 is usual


def scale_setting(run: Run, setting: str, factor: float, default: float | None = None) -> Change:
    """Propose a multiple of a setting: "1e-05 (it is 3e-05)"."""
    now = run.setting(setting, default)
    return Change(setting, f"{now * factor:.2g} (it is {now:g})" if now else f"{factor:g} times the current value")


def raise_kl(run: Run, factor: float) -> Change:
    """Propose a larger kl_coef, or a usual one for scores of this scale where it is 0."""
    if last(run["objective/kl_coef"]) > 0:
        return scale_setting(run, "algorithm.kl_coef", factor)
    return Change("algorithm.kl_coef", f"{USUAL_KL * kl_unit(run):.2g} (it is 0)")


def kl_units(run: Run) -> Series:
    """Return the scale that kl_coef is compared with: the deviation of what the KL is weighed against. [S]"""
    return advantage_deviations(run) if run.setting("algorithm.kl_in") == "loss" else score_deviations(run)


def advantage_deviations(run: Run) -> Series:
    """Return the scale of a term of the loss: 1 where the advantages are normalised, else about that of the scores. [S]

    An algorithm that keel does not know is taken to whiten its advantages, as a policy gradient does by default.
    """
    traits = ALGORITHM_TRAITS.get(str(run.setting("algorithm.name")))
    setting = traits.deviation_setting if traits else DEFAULT_DEVIATION_SETTING
    is_normalised = setting is not None and run.setting(f"algorithm.{setting}", True)
    return np.ones(len(run.steps)) if is_normalised else score_deviations(run)


def kl_unit(run: Run) -> float:
    """Return the last of `kl_units`; 1 where it is unknown or 0."""
    unit = last(kl_units(run))
    return unit if unit > 0 else 1.0


def score_deviations(run: Run) -> Series:
    """Return the deviation of the shaped scores, the largest window so far. [S]

    The largest, because a policy that has learned gives responses with nearly equal scores.
    """
    return highest(trailing_mean(run["objective/shaped_scores_std"], window(run)))


def score_deviation(run: Run) -> float:
    """Return the last of `score_deviations`; 1 where it is unknown or 0."""
    spread = last(score_deviations(run))
    return spread if spread > 0 else 1.0
