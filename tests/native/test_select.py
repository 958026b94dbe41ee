"""Order keys, ranks, radix select, greedy picks and the grid barrier, against sorting and counting in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native.floats import EVERY_BITS, to_float32

DROPPED, NAN, FORCED = 0, 1, 0xFFFFFFFF  # kDroppedKey, kNanKey, kForcedKey
SPECIAL = np.array(
    [
        np.nan,
        -np.nan,
        -np.inf,
        np.inf,
        0.0,
        -0.0,
        1e-45,
        -1e-45,
        1e-38,
        -1e-38,
        3.4e38,
        -3.4e38,
        1.0,
        np.nextafter(1, 2),
    ],
    dtype=np.float32,
)


def best_first(scores: np.ndarray) -> np.ndarray:
    """Places by descending score, NaN last, ties by place."""
    with np.errstate(invalid="ignore"):
        return np.lexsort((np.arange(len(scores)), -scores, np.isnan(scores)))


def assert_keys_keep_the_order(scores: np.ndarray, keys: np.ndarray):
    order = np.argsort(keys, kind="stable")
    numbers = ~np.isnan(scores[order])
    assert not numbers[: np.isnan(scores).sum()].any(), "NaN ranks below every number"
    sorted_scores, sorted_keys = scores[order][numbers], keys[order][numbers].astype(np.int64)
    assert np.all(sorted_scores[1:] >= sorted_scores[:-1])
    assert np.array_equal(np.diff(sorted_keys) == 0, sorted_scores[1:] == sorted_scores[:-1])
    assert np.all(keys[np.isnan(scores)] == NAN)
    assert sorted_keys.min() > NAN > DROPPED and sorted_keys.max() < FORCED


@pytest.mark.parametrize("bfloat16", [False, True])
def test_order_key_of_every_16_bit_float(native, bfloat16):
    scores = to_float32(EVERY_BITS, bfloat16)
    assert_keys_keep_the_order(scores, native.order_keys(scores))


def test_order_key_of_special_floats(native):
    keys = native.order_keys(SPECIAL)
    assert_keys_keep_the_order(SPECIAL, keys)
    assert keys[2] == 0x007FFFFF and keys[3] == 0xFF800000 and keys[4] == keys[5] == 0x80000000


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=200))
def test_order_key_of_any_floats(native, scores):
    scores = np.array([*scores, 0.0], dtype=np.float32)
    assert_keys_keep_the_order(scores, native.order_keys(scores))


@pytest.mark.parametrize("threads", [32, 256])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 255, 256, 257, 1000])
def test_arg_max(native, threads, count):
    random = np.random.default_rng(count)
    scores = random.integers(0, 5, count).astype(np.float32)
    for values in (scores, np.zeros_like(scores), np.full_like(scores, np.nan), np.resize(SPECIAL, count)):
        assert native.arg_max(values, threads) == (best_first(values)[0] if count else -1)


def assert_radix_select(native, keys: np.ndarray, k: int, threads: int):
    threshold, ties = native.radix_select(keys, k, threads)
    assert threshold == np.sort(keys)[::-1][k - 1]
    assert ties == k - np.count_nonzero(keys > threshold)


@pytest.mark.parametrize("threads", [32, 128, 1024])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025])
def test_radix_select_around_the_block_size(native, threads, count):
    random = np.random.default_rng(count)
    for keys in (
        random.integers(0, 1 << 32, count, dtype=np.uint32),
        random.integers(0, 4, count, dtype=np.uint32),
        np.full(count, 0xFFFFFFFF, dtype=np.uint32),
        np.zeros(count, dtype=np.uint32),
    ):
        for k in {1, 2, count // 2, count - 1, count} - {0, -1}:
            if k <= count:
                assert_radix_select(native, keys, k, threads)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_radix_select_of_digits_that_collide(native, data):
    """Bytes from a few values, so that keys share prefixes and differ in any digit."""
    digits = data.draw(st.lists(st.sampled_from([0, 1, 127, 128, 254, 255]), min_size=1, max_size=6, unique=True))
    byte = st.sampled_from(digits)
    rows = data.draw(st.lists(st.tuples(byte, byte, byte, byte), min_size=1, max_size=150))
    keys = np.array(rows, dtype=np.uint8).view(np.uint32).ravel()
    assert_radix_select(native, keys, data.draw(st.integers(1, len(keys))), data.draw(st.sampled_from([32, 96, 256])))


@pytest.mark.parametrize("by_rank", [True, False])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("tokens", "keep"), [(1, 1), (5, 5), (513, 40), (1100, 7)])
def test_greedy_pick(native, by_rank, blocks, tokens, keep):
    random = np.random.default_rng(tokens)
    scores = random.integers(-3, 4, (2, tokens)).astype(np.float32)
    scores[1] = random.permutation(np.resize(SPECIAL, tokens))
    expected = np.stack([best_first(row)[:keep] for row in scores])
    got = native.greedy_pick(scores, keep, by_rank, blocks)
    assert np.array_equal(got, expected if by_rank else np.sort(expected))


@pytest.mark.parametrize("first", [0, 0xFFFFFFF0], ids=["from_zero", "past_wrap"])
@pytest.mark.parametrize(("groups", "blocks"), [(1, 1), (1, 7), (3, 4)])
def test_grid_barrier(native, groups, blocks, first):
    posted, sums = native.grid_barrier(groups, blocks, 6, first)
    assert np.array_equal(posted.ravel() % 1000, np.tile(1 + np.arange(groups * blocks), 6))
    assert np.array_equal(sums, np.broadcast_to(posted.sum(axis=2, keepdims=True), posted.shape))


def test_an_array_of_another_dtype_is_an_error(native):
    with pytest.raises(TypeError):
        native.order_keys(np.zeros(3, dtype=np.float64))
