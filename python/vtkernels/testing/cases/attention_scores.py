from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _one_row(random: torch.Generator, dtype: torch.dtype):
    query, key = (torch.randn(2, n, 4 * 16, generator=random).to(dtype) for n in (1, 21))
    return tuple(x.unflatten(-1, (4, 16)).transpose(1, 2) for x in (query, key)), {}


def _causal_masks(random: torch.Generator, dtype: torch.dtype):
    query, key = (torch.randn(2, h, n, 24, generator=random).to(dtype) for h, n in ((4, 19), (2, 33)))
    key_mask, query_mask = (torch.rand(2, n, generator=random) < 0.7 for n in (33, 19))
    return (query, key), {"causal": True, "key_mask": key_mask, "query_mask": query_mask, "head_reduce": "none"}


def _given_lse(random: torch.Generator, dtype: torch.dtype):
    query, key = (torch.randn(1, 2, n, 64, generator=random).to(dtype) for n in (40, 50))
    lse = torch.randn(1, 2, 40, generator=random) + 5
    return (query, key), {"lse": lse, "query_reduce": "max", "head_reduce": "sum", "scale": 0.1}


CASES = [
    Case("attention_scores", "one row, strided heads", _one_row),
    Case("attention_scores", "causal, masks, grouped queries, heads kept", _causal_masks),
    Case("attention_scores", "given lse, max over rows", _given_lse),
]
