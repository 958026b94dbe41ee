"""Reductions and scans: integers exactly, floats to the bit in the documented order of combination."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

OPS = {0: np.add, 1: np.fmax, 2: np.fmin}


def butterfly(x: np.ndarray, op: int, lanes: int, stride: int = 1) -> np.ndarray:
    """Along the last axis: what lanes that exchange with their neighbours at half the distance each time compute."""
    places, step = np.arange(x.shape[-1]), lanes // 2 * stride
    while step >= stride:
        x = OPS[op](x, x[..., places ^ step])
        step //= 2
    return x


def values(dtype: type, shape, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if dtype == np.int32:
        return random.integers(-1000, 1000, shape, dtype=np.int32)
    return (random.standard_normal(shape) * 10.0 ** random.integers(-6, 6, shape)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("lanes", "stride"), [(32, 1), (4, 1), (8, 4), (1, 1)])
def test_warp_reduce(native, dtype, op, lanes, stride):
    x = values(dtype, (4, 32), seed=lanes)
    got = native.warp_reduce(x, op, lanes, stride)
    assert np.array_equal(got, butterfly(x, op, lanes, stride))
    groups = np.arange(32) // stride // lanes * stride + np.arange(32) % stride  # who is reduced together
    for group in np.unique(groups):
        exact = OPS[op].reduce(x[:, groups == group].astype(np.float64), axis=1)
        assert np.allclose(got[:, groups == group], exact[:, None], rtol=1e-5, atol=1e-6 * np.abs(x).max())


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("threads", [32, 64, 256, 1024])
def test_block_reduce(native, dtype, op, threads):
    x = values(dtype, threads, seed=threads)
    warps = butterfly(x.reshape(-1, 32), op, 32)[:, 0]
    expected = butterfly(warps, op, len(warps))[0]
    assert np.array_equal(native.block_reduce(x, op), np.full((2, threads), expected))


def test_a_nan_loses_a_maximum_and_spoils_a_sum(native):
    x = np.full(64, -np.inf, dtype=np.float32)
    x[7] = np.nan
    assert np.all(native.block_reduce(x, 1) == -np.inf)
    assert np.all(np.isnan(native.block_reduce(x, 0)))


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([32, 96, 1024]), st.integers(0, 1 << 30))
def test_block_prefix_of_integers(native, threads, seed):
    x = values(np.int32, threads, seed)
    before, total = native.block_prefix(x)
    assert np.array_equal(before, np.cumsum(x) - x)
    assert np.all(total == x.sum())


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_block_prefix_of_floats(native, threads):
    x = values(np.float32, threads, seed=threads)
    lanes, delta = x.reshape(-1, 32).copy(), 1
    while delta < 32:
        lanes[:, delta:] += lanes[:, :-delta].copy()
        delta *= 2
    warps_before, total = [], np.float32(0)
    for warp in lanes[:, 31]:
        warps_before.append(total)
        total += warp
    inside = np.pad(lanes[:, :-1], ((0, 0), (1, 0)))
    before, got_total = native.block_prefix(x)
    assert np.array_equal(before, (np.array(warps_before)[:, None] + inside).ravel())
    assert np.all(got_total == total)
