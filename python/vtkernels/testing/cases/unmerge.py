from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 6, 9, generator=random).to(dtype), torch.randint(0, 6, (2, 17), generator=random)), {}


def _strided(random: torch.Generator, dtype: torch.dtype):
    merged = torch.randn(7, 3, 24, generator=random).to(dtype).transpose(0, 1)[:, :, :20]
    return (merged, torch.randint(-1, 7, (19, 3), generator=random).t()), {}


CASES = [Case("unmerge", "plain", _plain), Case("unmerge", "dropped tokens, strided", _strided)]
