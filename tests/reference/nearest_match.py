"""nearest_match from its definition, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.bipartite_match import units

MAX_SQUARED_NORM = 2.0**125


def similarities(metric: Tensor, distance: str) -> Tensor:
    """[N, N] of one batch row [N, C], NaN for tokens that have none."""
    if distance == "cosine":
        unit = units(metric)
        return unit @ unit.T
    x = metric.double()
    x = torch.where((x.square().sum(-1) < MAX_SQUARED_NORM)[:, None], x, math.nan)
    return -(x[:, None] - x[None]).square().sum(-1)


def nearest_match(
    metric: Tensor, centers: Tensor, valid: Tensor | None = None, distance: str = "cosine"
) -> tuple[Tensor, Tensor]:
    owner = torch.full(metric.shape[:2], -1, dtype=torch.int64)
    similarity = torch.full(metric.shape[:2], -math.inf, dtype=torch.float64)
    for b in range(metric.shape[0]):
        table = similarities(metric[b], distance)
        rows = {n: k for k, n in enumerate(centers[b].tolist()) if n >= 0}
        for n in range(metric.shape[1]):
            if n in rows:
                owner[b, n], similarity[b, n] = rows[n], 1.0 if distance == "cosine" else 0.0
            elif rows and (valid is None or valid[b, n]):
                to_centers = table[n, list(rows)]
                best = int(to_centers.nan_to_num(-math.inf).argmax())
                owner[b, n], similarity[b, n] = list(rows.values())[best], to_centers[best]
    return owner, similarity
