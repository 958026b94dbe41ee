"""merge_apply from its definition, in float64 and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def reduce_row(x: Tensor, w: Tensor, reduce: str) -> Tensor:
    """Tokens [T, D] with weights [T], T >= 1."""
    if reduce == "weighted_mean":
        return (w[:, None] * x).sum(0) / w.sum()
    return {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}[reduce](x, dim=0)


def reduce_into(c: Tensor, x: Tensor, w: Tensor, reduce: str, beta: float) -> Tensor:
    """Sources [S, D] with weights [S] into the center [D]."""
    if reduce == "prune" or len(x) == 0:
        return c
    if reduce == "target_plus_mean":
        return c + x.mean(0)
    if reduce == "beta":
        return beta * c + (1 - beta) * x.mean(0)
    if reduce == "pivot":
        return torch.cat([c[None], (c + x) / 2]).mean(0)
    if reduce == "similarity_weighted":
        return torch.cat([c[None], w[:, None] * x]).mean(0)
    assert reduce == "sequential_half"
    for source in x:
        c = (c + source) / 2
    return c


def merge_apply(
    values: Tensor,
    owner: Tensor,
    out_len: int,
    weight: Tensor | None = None,
    reduce: str = "weighted_mean",
    center: Tensor | None = None,
    beta: float = 0.6,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    x = values.to(dtype)
    w = x.new_ones(x.shape[:2]) if weight is None else weight.to(dtype)
    merged = x.new_zeros(x.shape[0], out_len, x.shape[2])
    total = x.new_zeros(x.shape[0], out_len)
    for b in range(x.shape[0]):
        for row in range(out_len):
            tokens = (owner[b] == row).nonzero()[:, 0]
            if len(tokens) == 0:
                continue
            if center is None:
                merged[b, row] = reduce_row(x[b, tokens], w[b, tokens], reduce)
            else:
                c = center[b, row]
                sources = tokens[tokens != c]
                merged[b, row] = reduce_into(x[b, c], x[b, sources], w[b, sources], reduce, beta)
            total[b, row] = w[b, c] if reduce == "prune" else w[b, tokens].sum()
    return merged, total
