"""pass@k and avg@n: the shares of prompts and responses that are correct, for tasks whose responses can be verified."""

from collections.abc import Sequence

import torch

from keel.core.pass_at_k import pass_at_k
from keel.evaluation.judged import EvaluatedResponses, Metrics, interval_entries, row_mean, sum_by_prompt
from keel.stats.intervals import share_interval


def pass_rates(evaluated: EvaluatedResponses, measure: str, ks: Sequence[int], threshold: float) -> Metrics:
    """Compute pass@k for each k, and avg@n, the share of all n responses to a prompt that are correct.

    A response is correct if its score is at least the threshold. Responses without a score are left out, and prompts
    with fewer than k scores have no pass@k. The intervals are over prompts. Empty without ks or scores.

    Args:
        measure: name of the measurement that decides: `score`, or that of one scorer.
    """
    scores = evaluated.measured.get(measure)
    if not ks or scores is None or not bool(scores.isfinite().any()):
        return {}
    known, clusters = scores.isfinite(), evaluated.clusters
    # Scores are float32, in which 0.7 is less than the float64 of the threshold.
    is_correct = scores.float() >= torch.tensor(threshold, dtype=torch.float32)
    num_samples, num_correct = known.sum(1), (is_correct & known).sum(1)
    metrics: Metrics = {}
    for k in sorted(set(ks)):
        has_k = num_samples >= k
        if bool(has_k.any()):
            metrics |= row_mean(f"pass@{k}", pass_at_k(num_correct[has_k], num_samples[has_k], k), clusters[has_k])
    above, below = sum_by_prompt(num_correct, clusters), sum_by_prompt(num_samples, clusters)
    interval = share_interval(above.numpy(), below.numpy())
    return metrics | interval_entries(f"avg@{scores.shape[1]}", float(above.sum() / below.sum()), interval)
