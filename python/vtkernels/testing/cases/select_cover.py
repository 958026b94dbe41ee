from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    return (torch.rand(2, 12, 17, generator=random).to(dtype), 5), {}


def _masked(random: torch.Generator, dtype: torch.dtype):
    gains = torch.rand(35, 3, 44, generator=random).to(dtype).transpose(0, 1)[:, :, 3:40]
    drop_mask = torch.zeros(3, 37, dtype=torch.bool)
    drop_mask[:, 4:9] = True
    return (gains, 11), {"drop_mask": drop_mask, "order": "pick"}


def _nothing(random: torch.Generator, dtype: torch.dtype):
    return (torch.rand(2, 4, 3, generator=random).to(dtype), 0), {}


CASES = [
    Case("select_cover", "plain", _plain),
    Case("select_cover", "drop_mask, pick order, strided", _masked),
    Case("select_cover", "keep 0", _nothing),
]
