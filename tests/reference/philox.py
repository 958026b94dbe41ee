"""Philox4x32-10 of Salmon, Moraes, Dror and Shaw (SC 2011), the paper's round ten times."""

from __future__ import annotations


def philox(counter, key) -> tuple[int, ...]:
    a, b, c, d = counter
    for r in range(10):
        k0, k1 = (key[0] + r * 0x9E3779B9) % 2**32, (key[1] + r * 0xBB67AE85) % 2**32
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k0, right % 2**32, (left >> 32) ^ d ^ k1, left % 2**32
    return a, b, c, d


def stream_word(seed: int, position: int, node: int, purpose: int, index: int) -> int:
    """The first word of block ``index`` of a RandomStream (csrc/device/philox.cuh)."""
    counter = (index, node, position % 2**32, purpose)
    return philox(counter, (seed % 2**32, (seed >> 32) % 2**32))[0]
