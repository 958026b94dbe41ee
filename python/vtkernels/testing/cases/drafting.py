from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _ints(values: list, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def _compact(random: torch.Generator, dtype: torch.dtype):
    caches = [torch.randn(2, heads, 9, 8, generator=random).to(dtype) for heads in (2, 3)]
    return (caches, _ints([[0, 2, 3], [0, -1, -1]], torch.int64), _ints([2, 0])), {"tail": 5}


def _compact_ragged(random: torch.Generator, dtype: torch.dtype):
    caches = [torch.randn(2, 7, 2, 5, generator=random).to(dtype).transpose(1, 2) for _ in range(2)]
    return (caches, _ints([[1, 3], [0, 1]], torch.int64), _ints([-1, 1])), {"tail": 4, "slack": _ints([0, 3])}


def _greedy(random: torch.Generator, dtype: torch.dtype):
    return (torch.randn(3, 37, generator=random).to(dtype),), {}


def _drawn(random: torch.Generator, dtype: torch.dtype):
    logits = torch.randn(4, 50, generator=random).to(dtype)[:, :37]
    seeds, positions = torch.arange(4), torch.arange(4) + 7
    return (logits,), {"temperature": torch.tensor([0.0, 1.0, 0.5, 2.0]), "seeds": seeds, "positions": positions}


CASES = [
    Case("compact_accepted", "two layers of different heads", _compact),
    Case("compact_accepted", "slack, nothing moved, strided", _compact_ragged),
    Case("sample_stats", "greedy", _greedy),
    Case("sample_stats", "drawn", _drawn),
]
