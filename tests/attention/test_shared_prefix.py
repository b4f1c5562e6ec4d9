import numpy as np
import pytest

from radix_backend.attention.shared_prefix import shared_prefixes


def tables(*rows):
    """Page ids by row, and how many of them count."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), -7, np.int32)
    for row, pages in zip(ids, rows, strict=True):
        row[: len(pages)] = pages
    return ids, np.array([len(pages) for pages in rows])


def saved(ids, full, shared):
    return sum(int((count - 1) * pages) for count, pages in zip(shared.counts, shared.pages, strict=True))


def test_rows_of_a_tile_share_its_pages_and_no_row_is_in_two():
    generator = np.random.default_rng(0)
    for _ in range(200):
        prefixes = [generator.integers(0, 5, generator.integers(1, 9)).tolist() for _ in range(4)]
        rows = [
            [100 + page for page in prefixes[generator.integers(4)]] + [1000 * (i + 1) + j for j in range(i % 3)]
            for i in range(12)
        ]
        ids, full = tables(*rows)
        shared = shared_prefixes(ids, full, 4, 2)
        if shared is None:
            continue
        assert sorted(shared.order.tolist()) == list(range(12))
        covered = []
        for first, count, pages in zip(shared.firsts, shared.counts, shared.pages, strict=True):
            members = shared.order[first : first + count]
            assert 2 <= count <= 4
            assert 2 <= pages <= full[members].min()
            assert (ids[members][:, :pages] == ids[members[0]][:pages]).all()
            covered += members.tolist()
        assert len(set(covered)) == len(covered)


@pytest.mark.parametrize("rows", [[[1], [2], [3]], [[1, 2, 3]], [[1, 2, 8], [1, 2, 9]]])
def test_nothing_is_shared_where_prefixes_are_missing_or_short(rows):
    assert shared_prefixes(*tables(*rows), tile_rows=4, min_pages=3) is None


def test_what_lies_behind_a_rows_last_page_does_not_count():
    ids, _ = tables([1, 2, 3, 4], [1, 2, 3, 4])
    shared = shared_prefixes(ids, np.array([4, 2]), tile_rows=4, min_pages=1)
    assert shared.pages.tolist() == [2]


def test_the_level_that_saves_most_is_shared():
    long = [[0, *[group * 10 + page for page in range(1, 6)], 1000 + row] for group in range(2) for row in range(4)]
    assert sorted(shared_prefixes(*tables(*long), tile_rows=8, min_pages=1).pages) == [6, 6]
    wide = [[0, 1, 2, 10 + row // 2, 100 + row] for row in range(8)]
    assert shared_prefixes(*tables(*wide), tile_rows=8, min_pages=1).pages.tolist() == [3]


def test_a_large_group_is_cut_into_tiles():
    shared = shared_prefixes(*tables(*[[1, 2, 3, 100 + row] for row in range(9)]), tile_rows=4, min_pages=1)
    assert shared.counts.tolist() == [4, 4]  # the ninth row would be alone
    assert shared.firsts.tolist() == [0, 4]
