"""Asynchronous copies, mbarriers, ldmatrix and mma, and what the emulation says when a kernel uses them wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.floats import to_float32


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_multiply_tile(native, bfloat16):
    numbers = np.random.default_rng(7).standard_normal((2, 16, 16)).astype(np.float32)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16) if bfloat16 else numbers.astype(np.float16).view(np.uint16)
    a, b = to_float32(bits, bfloat16)
    got = native.multiply_tile(bits[0], bits[1], bfloat16, True)
    assert np.allclose(got, a.astype(np.float64) @ b, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="before its asynchronous copy was waited for: a read of"):
        native.multiply_tile(bits[0], bits[1], bfloat16, False)


@pytest.mark.parametrize("tiles", [0, 1, 2, 3, 7])
def test_ring_of_bulk_copies(native, tiles):
    values = np.arange(tiles * 64, dtype=np.int32).reshape(tiles, 64)
    assert np.array_equal(native.copy_ring(values, 256), 2 * values)


def test_bulk_copy_with_the_wrong_byte_count(native):
    message = (
        r"kernel vtk::native::copy_ring_kernel, block \(0,0,0\): deadlock: 64 threads wait, the first "
        r"thread \(32,0,0\) waits for parity 0 of mbarrier .*sFull \+ 0 \(tensor\.cu:\d+\), "
        r"0 of 1 arrivals and 16 bytes missing"
    )
    with pytest.raises(RuntimeError, match=message):
        native.copy_ring(np.zeros((1, 64), dtype=np.int32), 272)
