from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    tokens = torch.randn(2, 13, 6, generator=random).to(dtype)
    return (tokens, torch.randn(2, 13, generator=random).to(dtype), 5), {}


def _masked_heads(random: torch.Generator, dtype: torch.dtype):
    tokens = torch.randn(3, 16, 9, generator=random).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    keep_mask, drop_mask = torch.zeros(3, 16, dtype=torch.bool), torch.zeros(3, 16, dtype=torch.bool)
    keep_mask[:, 3], drop_mask[:, 4:6] = True, True
    options = {"keep_mask": keep_mask, "drop_mask": drop_mask, "head_reduce": "max", "order": "score"}
    return (tokens, torch.randn(3, 4, 16, generator=random), 7), options


def _attention(random: torch.Generator, dtype: torch.dtype):
    tokens = torch.randn(2, 11, 8, generator=random).to(dtype)
    query, key = (torch.randn(2, h, n, 16, generator=random).to(dtype) for h, n in ((4, 3), (2, 11)))
    return (tokens, query, key, 4), {"query_reduce": "max"}


def _varlen(random: torch.Generator, dtype: torch.dtype):
    tokens = torch.randn(12, 6, generator=random).to(dtype)
    bounds, keep = (torch.tensor(v, dtype=torch.int32) for v in ([0, 5, 5, 12], [2, 0, 4]))
    return (tokens, torch.randn(12, generator=random), bounds, keep), {}


def _varlen_total(random: torch.Generator, dtype: torch.dtype):
    args, _ = _varlen(random, dtype)
    return args, {"total_keep": 6}


def _tensors(random: torch.Generator, dtype: torch.dtype):
    tensors = [
        torch.randn(2, 10, 4, generator=random).to(dtype),  # hidden states
        torch.randn(1, 10, 8, generator=random).to(dtype),  # a rotary table shared by the batch
        torch.arange(60).reshape(3, 2, 10),  # M-RoPE position ids
    ]
    return (tensors, torch.randn(2, 10, generator=random), 3), {"token_dims": [1, 1, 2]}


CASES = [
    Case("prune_gather", "plain", _plain),
    Case("prune_gather", "masks, heads, score order, strided", _masked_heads),
    Case("prune_gather.attention", "grouped queries", _attention),
    Case("prune_gather.varlen", "an empty segment", _varlen),
    Case("prune_gather.varlen", "known total", _varlen_total),
    Case("prune_gather.tensors", "states, table, positions", _tensors),
]
