from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 17, 9, generator=random).to(dtype), 4), {}


def _masked(random: torch.Generator, dtype: torch.dtype):
    tokens = torch.randn(30, 3, 12, generator=random).to(dtype).transpose(0, 1)[:, :, :10]
    return (tokens, 6), {"iterations": 3, "tolerance": 0.5, "valid": torch.rand(3, 30, generator=random) < 0.8}


def _nothing(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 4, 3, generator=random).to(dtype), 0), {}


CASES = [
    Case("cluster_kmedoids", "plain", _plain),
    Case("cluster_kmedoids", "iterations, tolerance, valid, strided", _masked),
    Case("cluster_kmedoids", "no clusters", _nothing),
]
