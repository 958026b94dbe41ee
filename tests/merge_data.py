"""What the tests of the merge family share: metrics, and the merge in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ANGLES = [0.0, 10.0, 90.0, 82.0, 50.0, 200.0]


def on_the_circle(angles: list[float]) -> Tensor:
    """Unit vectors [1, N, 2] at these angles in degrees."""
    radians = torch.deg2rad(torch.tensor(angles))
    return torch.stack([radians.cos(), radians.sin()], dim=-1)[None]


def golden_metric() -> Tensor:
    """Six unit vectors [1, 6, 2]: the best edges are 2 -> 3 (0.9903), 0 -> 1 (0.9848) and 4 -> 3 (0.8480)."""
    return on_the_circle(ANGLES)


def exact_metric(random: torch.Generator, batch: int, count: int, width: int) -> Tensor:
    """Rows with 0, 1, 4 or 16 entries of +-1, others 0: cosines are multiples of 1/16, and ties are everywhere."""
    most = torch.tensor([n for n in (0, 1, 4, 16) if n <= width][-3:])
    entries = most[torch.randint(len(most), (batch, count, 1), generator=random)]
    rank = torch.rand(batch, count, width, generator=random).argsort(-1)
    return (rank < entries) * (torch.randint(0, 2, (batch, count, width), generator=random) * 2.0 - 1)


def drop_some(random: torch.Generator, batch: int, count: int, share: float = 0.2) -> Tensor:
    return torch.rand(batch, count, generator=random) < share


def counts(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def bounds(lengths: list[int]) -> Tensor:
    """cu_seqlens of segments of these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def plain_merge(
    values: Tensor, owner: Tensor, out_len: int, weight: Tensor | None = None, reduce: str = "weighted_mean"
) -> Tensor:
    """merge_apply in torch ops at the dtype of the values."""
    index = (owner + 1)[..., None].expand_as(values)
    scaled = values * weight[..., None].to(values.dtype) if reduce == "weighted_mean" and weight is not None else values
    name = {"max": "amax"}.get(reduce, "sum")
    base = values.new_full((values.shape[0], out_len + 1, values.shape[2]), -math.inf if reduce == "max" else 0)
    merged = base.scatter_reduce(1, index, scaled, name)[:, 1:]
    ones = values.new_ones(owner.shape) if weight is None or reduce != "weighted_mean" else weight.to(values.dtype)
    total = ones.new_zeros(values.shape[0], out_len + 1).scatter_add(1, owner + 1, ones)[:, 1:, None]
    merged = merged / total if reduce in ("weighted_mean", "mean") else merged
    return merged.where(total != 0, 0)


def assert_weights(total: Tensor, expected: Tensor) -> None:
    """Sums of at most a few hundred float32 weights, of which each addition rounds once."""
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
