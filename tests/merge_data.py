"""Metrics for the tests of the merge family."""

from __future__ import annotations

import torch
from torch import Tensor

ANGLES = [0.0, 10.0, 90.0, 82.0, 50.0, 200.0]


def golden_metric() -> Tensor:
    """Six unit vectors [1, 6, 2]: the best edges are 2 -> 3 (0.9903), 0 -> 1 (0.9848) and 4 -> 3 (0.8480)."""
    angles = torch.deg2rad(torch.tensor(ANGLES))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None]


def exact_metric(random: torch.Generator, batch: int, count: int, width: int) -> Tensor:
    """Rows with 0, 1, 4 or 16 entries of +-1, others 0: cosines are multiples of 1/16, and ties are everywhere."""
    most = torch.tensor([n for n in (0, 1, 4, 16) if n <= width][-3:])
    entries = most[torch.randint(len(most), (batch, count, 1), generator=random)]
    rank = torch.rand(batch, count, width, generator=random).argsort(-1)
    return (rank < entries) * (torch.randint(0, 2, (batch, count, width), generator=random) * 2.0 - 1)


def drop_some(random: torch.Generator, batch: int, count: int, share: float = 0.2) -> Tensor:
    return torch.rand(batch, count, generator=random) < share
