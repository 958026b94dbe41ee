from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 17, 9, generator=random).to(dtype), 5), {}


def _masked(random: torch.Generator, dtype: torch.dtype):
    metric = torch.randn(40, 3, 24, generator=random).to(dtype).transpose(0, 1)[:, :, :20]
    protect = torch.zeros(3, 40, dtype=torch.bool)
    protect[:, [0, 7]] = True
    rank = torch.rand(3, 40, generator=random).argsort(-1)
    return (metric, 11), {"protect": protect, "threshold": 0.1, "rank": rank}


def _nothing(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 4, 3, generator=random).to(dtype), 0), {}


CASES = [
    Case("bipartite_match", "plain", _plain),
    Case("bipartite_match", "protect, threshold, rank, strided", _masked),
    Case("bipartite_match", "r 0", _nothing),
]
