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


def _causal(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(2, 20, 3, generator=random).to(dtype), 20), {"split": "causal", "threshold": 0.5}


def _packed(random: torch.Generator, dtype: torch.dtype):
    metric = torch.randn(24, 9, generator=random).to(dtype)
    cu_seqlens = torch.tensor([0, 11, 11, 12, 24], dtype=torch.int32)
    return (metric, cu_seqlens, torch.tensor([3, 0, 1, 9], dtype=torch.int32)), {}


def _packed_and_causal(random: torch.Generator, dtype: torch.dtype):
    args, _ = _packed(random, dtype)
    protect = torch.arange(24) % 7 == 0
    return args, {"protect": protect, "split": "causal", "threshold": 0.2}


CASES = [
    Case("bipartite_match", "plain", _plain),
    Case("bipartite_match", "protect, threshold, rank, strided", _masked),
    Case("bipartite_match", "r 0", _nothing),
    Case("bipartite_match", "causal", _causal),
    Case("bipartite_match.varlen", "packed segments", _packed),
    Case("bipartite_match.varlen", "causal, threshold, protect", _packed_and_causal),
]
