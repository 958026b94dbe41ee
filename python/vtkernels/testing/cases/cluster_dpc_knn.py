from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 17, 9, generator=random).to(dtype), 4), {}


def _masked(random: torch.Generator, dtype: torch.dtype):
    tokens = torch.randn(40, 3, 24, generator=random).to(dtype).transpose(0, 1)[:, :, :20]
    valid = torch.rand(3, 40, generator=random) < 0.8
    return (tokens, 6), {"k": 3, "valid": valid, "counts": torch.tensor([6, 0, 2], dtype=torch.int32)}


def _nothing(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 4, 3, generator=random).to(dtype), 0), {}


CASES = [
    Case("cluster_dpc_knn", "plain", _plain),
    Case("cluster_dpc_knn", "k, valid, counts, strided", _masked),
    Case("cluster_dpc_knn", "no clusters", _nothing),
]
