from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    centers = torch.rand(2, 17, generator=random).argsort(-1)[:, :5]
    return (torch.randn(2, 17, 9, generator=random).to(dtype), centers), {}


def _masked(random: torch.Generator, dtype: torch.dtype):
    metric = torch.randn(40, 3, 24, generator=random).to(dtype).transpose(0, 1)[:, :, :20]
    centers = torch.rand(40, 3, generator=random).argsort(0)[:11].t()
    valid = (torch.rand(3, 40, generator=random) < 0.8).scatter(1, centers, True)
    return (metric, centers), {"valid": valid, "distance": "euclidean"}


def _no_centers(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 4, 3, generator=random).to(dtype), torch.full((2, 3), -1)), {}


CASES = [
    Case("nearest_match", "plain", _plain),
    Case("nearest_match", "euclidean, valid, strided", _masked),
    Case("nearest_match", "no centers", _no_centers),
]
