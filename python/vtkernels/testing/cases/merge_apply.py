from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    owner = torch.randint(0, 6, (2, 17), generator=random)
    return (torch.randn(2, 17, 9, generator=random).to(dtype), owner, 6), {}


def _weighted(random: torch.Generator, dtype: torch.dtype):
    values = torch.randn(40, 3, 24, generator=random).to(dtype).transpose(0, 1)[:, :, :20]
    owner = torch.randint(-1, 30, (40, 3), generator=random).t()
    return (values, owner, 30), {"weight": torch.rand(3, 40, generator=random).add(0.5).to(dtype)}


def _reduced(reduce: str):
    def make(random: torch.Generator, dtype: torch.dtype):
        owner = torch.randint(-1, 7, (2, 30), generator=random)
        return (torch.randn(2, 30, 16, generator=random).to(dtype), owner, 7), {"reduce": reduce}

    return make


def _centered(reduce: str):
    def make(random: torch.Generator, dtype: torch.dtype):
        center = torch.tensor([[8, 2, 29], [0, 14, 17]])
        owner = torch.randint(-1, 3, (2, 30), generator=random).scatter(1, center, torch.arange(3).expand(2, -1))
        return (torch.randn(2, 30, 16, generator=random).to(dtype), owner, 3), {"reduce": reduce, "center": center}

    return make


CASES = [
    Case("merge_apply", "plain", _plain),
    Case("merge_apply", "weights, dropped tokens, strided", _weighted),
    *(Case("merge_apply", reduce, _reduced(reduce)) for reduce in ("mean", "sum", "max")),
    *(Case("merge_apply", reduce, _centered(reduce)) for reduce in ("beta", "sequential_half", "prune")),
]
