"""Rows dealt to processes by tokens."""

import pytest

from keel.learn.gather import deal_rows


@pytest.mark.parametrize(
    ("processes", "dealt"),
    [
        (1, [[4, 0, 2, 1, 3]]),
        (2, [[4, 3], [0, 2, 1]]),  # 9 + 1 tokens, and 5 + 2 + 3
        (3, [[4], [0, 3], [2, 1]]),
        (7, [[4], [0], [1], [2], [3], [], []]),
    ],
)
def test_the_longest_rows_go_first_to_whoever_has_least(processes: int, dealt: list[list[int]]) -> None:
    assert deal_rows([4, 0, 2, 1, 3], [5, 3, 2, 1, 9], processes) == dealt


def test_every_row_is_dealt_once_and_the_loads_are_alike() -> None:
    tokens = [17 * row % 41 + 1 for row in range(64)]
    dealt = deal_rows(range(64), tokens, 8)
    assert sorted(row for rows in dealt for row in rows) == list(range(64))
    loads = [sum(tokens[row] for row in rows) for rows in dealt]
    assert max(loads) <= 1.02 * sum(loads) / 8
