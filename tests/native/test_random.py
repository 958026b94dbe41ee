"""Philox4x32-10 against the known answers of its authors and against the definition in Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.philox import philox

# Random123 distribution, tests/kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.integers(0, 0xFFFFFFFF)


def array(*rows) -> np.ndarray:
    return np.array(rows, dtype=np.uint32)


def test_known_answers(native):
    counters, keys, answers = zip(*KNOWN, strict=True)
    assert np.array_equal(native.philox(array(*counters), array(*keys)), array(*answers))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD)), min_size=1, max_size=20))
def test_any_counter_and_key(native, draws):
    counters, keys = zip(*draws, strict=True)
    assert np.array_equal(native.philox(array(*counters), array(*keys)), array(*map(philox, counters, keys)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**64 - 1), WORD, WORD, WORD)
def test_stream_is_a_function_of_what_it_is_for(native, seed, position, node, purpose):
    got = native.random_stream(seed, position, node, purpose, 3)
    key = (seed % 2**32, seed >> 32)
    assert np.array_equal(got, array(*(philox((i, node, position, purpose), key) for i in range(3))))


def test_uniforms(native):
    random = np.random.default_rng(1)
    edges = [0, 1, 127, 128, 129, 255, 256, 257, 2**24 - 1, 2**24, 2**31, 2**32 - 256, 2**32 - 129, 2**32 - 1]
    words = np.concatenate([np.array(edges, dtype=np.uint32), random.integers(0, 2**32, 5000, dtype=np.uint32)])
    words.sort()
    below_one, above_zero = native.uniforms(words)
    wide = words.astype(np.float64)
    assert np.array_equal(below_one.astype(np.float64), np.floor(wide / 256) / 2**24), "multiples of 2^-24, exactly"
    assert below_one.min() == 0 and below_one.max() == 1 - 2**-24
    assert np.all(np.abs(above_zero - (wide + 0.5) / 2**32) <= np.spacing(above_zero)), "to the last place of float32"
    assert above_zero.min() == 2**-33 and above_zero.max() == 1
    assert np.all(np.diff(above_zero) >= 0)


def test_uniforms_are_uniform(native):
    """Kolmogorov-Smirnov: 40,000 draws of one stream stay within the 99.9 % band, 1.95 / sqrt(n)."""
    words = native.random_stream(2026, 11, 0, 1, 10_000).ravel()
    grid = (np.arange(len(words)) + 0.5) / len(words)
    for u in native.uniforms(words):
        assert np.abs(np.sort(u.astype(np.float64)) - grid).max() < 1.95 / np.sqrt(len(words))
