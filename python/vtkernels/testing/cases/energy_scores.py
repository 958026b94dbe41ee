from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 17, 9, generator=random).to(dtype),), {}


def _gaussian(random: torch.Generator, dtype: torch.dtype):
    metric = torch.randn(70, 2, 24, generator=random).to(dtype).transpose(0, 1)[:, :, :20]
    return (metric,), {"margin": 0.4, "kind": "gaussian", "valid": torch.rand(2, 70, generator=random) < 0.8}


CASES = [
    Case("energy_scores", "plain", _plain),
    Case("energy_scores", "gaussian, valid, strided", _gaussian),
]
