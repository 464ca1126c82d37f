"""A judge as a scorer: it scores each response, or compares the responses to one prompt."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from math import ceil

from keel.data.batches import Rollouts
from keel.data.messages import Content
from keel.errors import ConfigError
from keel.judge.comparisons import Group, compare_groups, rank_groups, results_from_ranks, win_rates
from keel.judge.judge import Judge, NoVerdict
from keel.judge.questions import MOST_RESPONSES
from keel.rollout.score_check import NoScore, Score


class JudgeScorer:
    """A judge that scores each response by itself, or by the share of the other responses to its prompt that it beats.

    Segments are ignored: the score is that of the full response.
    """

    def __init__(
        self,
        judge: Judge,
        mode: str,
        scale: tuple[int, int],
        name: str,
        weight: float = 1.0,
        noisy: bool = False,
        group_size: int = MOST_RESPONSES,
    ) -> None:
        """Set what the judge is asked.

        Args:
            group_size: largest number of adjacent responses to one prompt that are compared with each other.
        """
        self.judge, self.mode, self.scale, self.group_size = judge, mode, scale, group_size
        self.name, self.weight, self.noisy = name, weight, noisy

    @property
    def compares(self) -> bool:
        """Whether the score of a response depends on the other responses to its prompt."""
        return self.mode != "score"

    def __call__(self, rollouts: Rollouts, segments: list[list[str]] | None) -> list[Score]:
        contents = [prompt.content for prompt in rollouts.prompts]
        if not self.compares:
            pairs = zip(contents, rollouts.texts, strict=True)
            return _scores(self.judge.ask([self.judge.writer.score(*pair, self.scale) for pair in pairs]))
        groups = adjacent_groups(contents, rollouts.texts, self.group_size)
        several = [group for group in groups if len(group.responses) > 1]
        if self.mode == "pairwise":
            rates = iter([win_rates(results) for results in compare_groups(self.judge, several)])
        else:
            ranked = rank_groups(self.judge, several)
            rates = iter(
                [
                    [ranks] * len(group.responses)
                    if isinstance(ranks, NoVerdict)
                    else win_rates(results_from_ranks(ranks))
                    for group, ranks in zip(several, ranked, strict=True)
                ]
            )
        return [score for group in groups for score in (_scores(next(rates)) if len(group.responses) > 1 else [None])]


def adjacent_groups(contents: Sequence[Content], texts: Sequence[str], group_size: int) -> list[Group]:
    """Return the responses to each prompt, in groups of at most `group_size`. Rows of one group are adjacent.

    Adjacent groups of a step have the same prompt if it is drawn twice. They stay apart: what a response is compared
    with depends neither on the place of its group in the batch nor on the process.
    """
    groups = []
    for prompt, rows in groupby(zip(contents, texts, strict=True), key=lambda row: row[0]):
        responses = tuple(text for _, text in rows)
        count = ceil(len(responses) / group_size)
        ends = [len(responses) * number // count for number in range(count + 1)]
        groups += [Group(prompt, responses[first:last]) for first, last in pairwise(ends)]
    return groups


def refuse_comparisons(scorers: Sequence[object], where: str) -> None:
    """Raise ConfigError for a judge that compares responses, where responses are scored one by one."""
    for scorer in scorers:
        if isinstance(scorer, JudgeScorer) and scorer.compares:
            raise ConfigError(
                f"the judge {scorer.name} compares responses to one prompt, and has no score for a single one",
                where,
                "set judge.mode: score, or let keel rank compare the file of --pairs with this judge",
            )


def _scores(verdicts: Sequence[float | NoVerdict]) -> list[Score]:
    return [NoScore(each.reason) if isinstance(each, NoVerdict) else each for each in verdicts]
