"""Inputs of the tests of attention over lists."""

from __future__ import annotations

import torch


def inputs(random, rows, keys, depth=16, batch=1, heads=2, key_heads=None, dtype=torch.float32):
    shapes = [(heads, rows), (key_heads or heads, keys), (key_heads or heads, keys)]
    return [torch.randn(batch, h, n, depth, generator=random).to(dtype) for h, n in shapes]


def lists(random, rows, limit, block_q=64, batch=1, heads=1, density=0.6):
    """Random lists in random order: counts [batch, heads, Mq] and indices [batch, heads, Mq, limit]."""
    chosen = torch.rand(batch, heads, -(-rows // block_q), limit, generator=random)
    counts = (chosen < density).sum(-1).int()
    return counts, chosen.argsort(-1).int()


def all_blocks(rows, keys, block_q=64, block_k=64):
    down, across = -(-rows // block_q), -(-keys // block_k)
    counts = torch.full((1, 1, down), across, dtype=torch.int32)
    return counts, torch.arange(across, dtype=torch.int32).expand(1, 1, down, across)
