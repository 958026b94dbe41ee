from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 17, 9, generator=random).to(dtype), 5), {}


def _seeded(random: torch.Generator, dtype: torch.dtype):
    features = torch.randn(40, 3, 24, generator=random).to(dtype).transpose(0, 1)[:, :, :20]
    drop_mask = torch.zeros(3, 40, dtype=torch.bool)
    drop_mask[:, 4:9] = True
    return (features, 11, torch.tensor([3, 0, 39])), {"mode": "max_sum", "drop_mask": drop_mask, "order": "pick"}


def _nothing(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 4, 3, generator=random).to(dtype), 0), {}


CASES = [
    Case("select_diverse", "plain", _plain),
    Case("select_diverse", "max_sum, seed, drop_mask, strided", _seeded),
    Case("select_diverse", "keep 0", _nothing),
]
