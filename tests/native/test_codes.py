"""Packed codes and their decoding to pairs of 16-bit floats: exact, for every code in every place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.native.floats import EVERY_BITS, to_float32

POISON = 0xFFFF


@pytest.mark.parametrize(("dtype", "bfloat16"), [(1, False), (2, True)], ids=["float16", "bfloat16"])
def test_load_of_every_16_bit_float(native, dtype, bfloat16):
    got, expected = native.load_floats(EVERY_BITS, dtype), to_float32(EVERY_BITS, bfloat16)
    assert np.array_equal(got, expected, equal_nan=True)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.signbit(got[numbers]), np.signbit(expected[numbers]))


def pair_order(bits: int) -> np.ndarray:
    """The bit at which code i of a word starts."""
    i = np.arange(32 // bits)
    return bits * (i // 2) + 16 * (i % 2)


def words_of(codes: np.ndarray, bits: int) -> np.ndarray:
    return np.bitwise_or.reduce(codes.astype(np.uint32) << pair_order(bits).astype(np.uint32), axis=1)


def words(alphabet: int, per_word: int, dtype=np.uint8, least: int = 0):
    return st.integers(1, 5).flatmap(
        lambda n: hnp.arrays(dtype, (n, per_word), elements=st.integers(least, least + alphabet - 1))
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pack_codes(native, bits, data):
    codes = data.draw(words(1 << bits, 32 // bits))
    packed, unpacked = native.pack_codes(codes, bits)
    assert np.array_equal(packed, words_of(codes, bits))
    assert np.array_equal(unpacked, codes)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pack_ternary(native, data):
    values = data.draw(words(3, 32, np.int8, least=-1))
    planes, unpacked = native.pack_ternary(values)
    assert np.array_equal(planes, np.stack([words_of(values != 0, 1), words_of(values < 0, 1)], axis=1))
    assert np.array_equal(unpacked, values)


EVERY_TRITS = np.array(list(itertools.product(range(3), repeat=5)), dtype=np.uint8)


def test_every_byte_of_five_trits(native):
    packed, unpacked = native.pack_trits(EVERY_TRITS)
    assert len(set(packed.tolist())) == 243
    assert np.array_equal(unpacked, EVERY_TRITS)
    assert np.array_equal(packed, np.ceil(np.arange(243) * 256 / 243))


# Decoding: 32 columns of 16-bit floats, two a pair; a word of 32 / bits codes fills that many.


def assert_decodes_to(native_bits: np.ndarray, bfloat16: bool, expected: np.ndarray):
    columns = expected.shape[1]
    assert np.array_equal(to_float32(np.ascontiguousarray(native_bits[:, :columns]), bfloat16), expected)
    assert np.all(native_bits[:, columns:] == POISON)


def every_code_in_every_place(bits: int) -> np.ndarray:
    """Each code in each place, among neighbours that are all zeros, all ones or random."""
    places, codes = 32 // bits, 1 << bits
    random = np.random.default_rng(bits)
    rows = []
    for code, place in itertools.product(range(codes), range(places)):
        for row in (np.zeros(places), np.full(places, codes - 1), random.integers(0, codes, places)):
            row = row.astype(np.uint8)
            row[place] = code
            rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "zero"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 8)])
def test_code_pairs(native, bits, zero, bfloat16):
    codes = every_code_in_every_place(bits)
    decoded = native.code_pairs(words_of(codes, bits), bits, zero, bfloat16)
    assert_decodes_to(decoded, bfloat16, codes.astype(np.float32) - zero)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_sign_pairs(native, bfloat16):
    codes = every_code_in_every_place(1)
    assert_decodes_to(native.sign_pairs(words_of(codes, 1), bfloat16), bfloat16, 1 - 2 * codes.astype(np.float32))


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_ternary_pairs(native, bfloat16):
    random = np.random.default_rng(3)
    values = np.concatenate([random.integers(-1, 2, (100, 32)), np.full((1, 32), -1), np.zeros((1, 32))])
    planes, _ = native.pack_ternary(values.astype(np.int8))
    assert_decodes_to(native.ternary_pairs(planes, bfloat16), bfloat16, values.astype(np.float32))


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_trit_pairs(native, bfloat16):
    """Pair 2 t + h of a word is trit t of bytes 2 h and 2 h + 1."""
    random = np.random.default_rng(5)
    trits = EVERY_TRITS[np.concatenate([np.arange(243), random.integers(0, 243, 4 * 60 + 1)])]
    packed, _ = native.pack_trits(trits)
    by_pair = trits.reshape(-1, 2, 2, 5).transpose(0, 3, 1, 2).reshape(-1, 20)
    assert_decodes_to(native.trit_pairs(packed.view(np.uint32), bfloat16), bfloat16, by_pair.astype(np.float32) - 1)
