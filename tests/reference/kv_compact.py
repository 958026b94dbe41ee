"""kv_compact from its definition."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def kv_compact(k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, _, width = k.shape
    out = tuple(torch.empty(batch, heads, indices.shape[-1], width, dtype=x.dtype) for x in (k, v))
    for b, h, i in itertools.product(range(batch), range(heads), range(indices.shape[-1])):
        n = indices[b, i] if indices.dim() == 2 else indices[b, h, i]
        out[0][b, h, i], out[1][b, h, i] = k[b, h, n], v[b, h, n]
    return out
