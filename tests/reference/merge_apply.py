"""merge_apply from its definition, in float64 and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_apply(
    values: Tensor, owner: Tensor, out_len: int, weight: Tensor | None = None, reduce: str = "weighted_mean"
) -> tuple[Tensor, Tensor]:
    x = values.double()
    w = x.new_ones(x.shape[:2]) if weight is None else weight.double()
    merged = x.new_zeros(x.shape[0], out_len, x.shape[2])
    total = x.new_zeros(x.shape[0], out_len)
    for b in range(x.shape[0]):
        for row in range(out_len):
            tokens = (owner[b] == row).nonzero()[:, 0]
            weights = w[b, tokens]
            total[b, row] = weights.sum()
            if len(tokens) == 0:
                continue
            if reduce == "weighted_mean":
                merged[b, row] = (weights[:, None] * x[b, tokens]).sum(0) / weights.sum()
            else:
                merged[b, row] = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}[reduce](x[b, tokens], dim=0)
    return merged, total
