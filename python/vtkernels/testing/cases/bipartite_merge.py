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


CASES = [
    Case("bipartite_merge", "plain", _plain),
    Case("bipartite_merge", "size, protect, ToMe's order, strided", _protected),
    Case("bipartite_merge", "r 0", _nothing),
]
