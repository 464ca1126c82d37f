from keel.data.padding import microbatches, pad_rows


def test_rows_are_padded_on_either_side():
    tokens, mask = pad_rows([[5, 6], [7]], pad_id=0)
    assert tokens.tolist() == [[5, 6], [7, 0]]
    assert mask.tolist() == [[True, True], [True, False]]
    tokens, mask = pad_rows([[5, 6], [7]], pad_id=0, side="left")
    assert tokens.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[True, True], [False, True]]


def test_microbatches_contain_every_row_once_within_the_limit():
    lengths = [3, 9, 1, 4, 4, 12, 2]
    groups = microbatches(lengths, 12)
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert all(len(group) * max(lengths[i] for i in group) <= 12 for group in groups)
    assert groups[0] == [5]


def test_a_row_longer_than_the_limit_is_a_group():
    assert microbatches([50, 1, 1], 10) == [[0], [1, 2]]
    assert microbatches([], 10) == []
