"""Index arithmetic of tiles: every element once, and what a definition by counting says."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

COUNT, SIZE = st.integers(0, 3000), st.integers(1, 300)


@settings(max_examples=50, deadline=None)
@given(COUNT, SIZE)
def test_ceil_div_and_round_up(native, x, y):
    assert native.ceil_div(x, y) == -(-x // y)
    assert native.round_up(x, y) == min(m for m in range(x, x + y) if m % y == 0)


@settings(max_examples=50, deadline=None)
@given(COUNT, SIZE)
def test_tiles_cover_their_range(native, total, tile_size):
    tiles = [native.tile_range(t, tile_size, total) for t in range(native.ceil_div(total, tile_size))]
    assert [i for begin, end in tiles for i in range(begin, end)] == list(range(total))
    assert all(end - begin == tile_size for begin, end in tiles[:-1])
    assert native.tile_range(len(tiles), tile_size, total) == (total, total)


def test_tile_range_does_not_overflow(native):
    assert native.tile_range(2**24, 128, 2**31 - 1) == (2**31 - 1, 2**31 - 1)
    assert native.tile_range(2**24 - 1, 128, 2**31 - 1) == (2**31 - 128, 2**31 - 1)


@settings(max_examples=50, deadline=None)
@given(COUNT, st.integers(1, 40), st.sampled_from([1, 2, 64, 128]))
def test_splits_cover_their_list_and_are_equal(native, count, splits, unit):
    parts = [native.split_range(count, splits, s, unit) for s in range(splits)]
    assert [i for begin, end in parts for i in range(begin, end)] == list(range(count))
    units = [native.ceil_div(end - begin, unit) for begin, end in parts]
    assert max(units) - min(units) <= 1 and units == sorted(units, reverse=True)
    assert all(begin % unit == 0 or begin == count for begin, _ in parts)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 64))
def test_packed_rows(native, row, group):
    query, head = native.packed_row(row, group)
    assert 0 <= head < group and native.row_of(query, head, group) == row
    assert query == row // group


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 80), st.integers(0, 80))
def test_visible_keys(native, num_queries, num_keys):
    for query in range(num_queries):
        visible = [key for key in range(num_keys) if key <= query + num_keys - num_queries]
        assert native.visible_keys(query, num_queries, num_keys) == len(visible)
