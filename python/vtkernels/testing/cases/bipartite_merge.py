from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    tokens, metric = (torch.randn(2, 17, width, generator=random).to(dtype) for width in (12, 9))
    return (tokens, metric, 5), {}


def _protected(random: torch.Generator, dtype: torch.dtype):
    tokens = torch.randn(40, 3, 24, generator=random).to(dtype).transpose(0, 1)[:, :, :20]
    metric = torch.randn(3, 40, 16, generator=random).to(dtype)
    protect = torch.zeros(3, 40, dtype=torch.bool)
    protect[:, [0, 7]] = True
    size = torch.randint(1, 5, (3, 40), generator=random).float()
    return (tokens, metric, 11), {"size": size, "protect": protect, "order": "tome"}


def _nothing(random: torch.Generator, dtype: torch.dtype):
    tokens = torch.randn(2, 4, 3, generator=random).to(dtype)
    return (tokens, tokens.clone(), 0), {}


def _packed(random: torch.Generator, dtype: torch.dtype):
    tokens, metric = (torch.randn(24, width, generator=random).to(dtype) for width in (12, 9))
    cu_seqlens = torch.tensor([0, 11, 11, 12, 24], dtype=torch.int32)
    r = torch.tensor([3, 0, 1, 9], dtype=torch.int32)
    size = torch.randint(1, 5, (24,), generator=random).float()
    return (tokens, metric, cu_seqlens, r), {"size": size, "order": "tome", "out_len": 24}


CASES = [
    Case("bipartite_merge", "plain", _plain),
    Case("bipartite_merge", "size, protect, ToMe's order, strided", _protected),
    Case("bipartite_merge", "r 0", _nothing),
    Case("bipartite_merge.varlen", "packed segments, out_len given", _packed),
]
