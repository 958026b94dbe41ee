"""select_diverse from its definition, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_NORM = 2.0**-63  # squared: the smallest normal float32


def similarities(features: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C] to the cosine matrix [N, N] (0 for zero vectors and tokens that rank last) and who ranks last [N]."""
    x = features.double()
    norm = x.norm(dim=-1)
    last = ~(norm.square() < 2.0**128)  # NaN, infinity, or a squared norm beyond float32
    unit = torch.where((last | (norm < MIN_NORM))[:, None], 0.0, x / norm[:, None])
    return unit @ unit.T, last


def combine(value: Tensor, row: Tensor, mode: str) -> Tensor:
    return torch.maximum(value, row) if mode == "max_min" else value + row


def select_row(features: Tensor, keep: int, seed: int | None, dropped: Tensor, mode: str) -> list[int]:
    if keep == 0:
        return []
    similarity, last = similarities(features)
    picked = [int((~dropped).nonzero()[0]) if seed is None else seed]
    free, value = ~dropped, similarity[picked[0]]
    free[picked[0]] = False
    while len(picked) < keep:
        candidates = free & ~last
        best = value[candidates].min() if candidates.any() else 0.0
        ties = candidates & (value == best) if candidates.any() else free
        picked.append(int(ties.nonzero()[0]))
        free[picked[-1]] = False
        value = combine(value, similarity[picked[-1]], mode)
    return picked


def select_diverse(
    features: Tensor,
    keep: int,
    seed: Tensor | None = None,
    mode: str = "max_min",
    drop_mask: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    rows = []
    for b in range(features.shape[0]):
        dropped = torch.zeros(features.shape[1], dtype=torch.bool) if drop_mask is None else drop_mask[b]
        picked = select_row(features[b], keep, None if seed is None else int(seed[b]), dropped, mode)
        rows.append(sorted(picked) if order == "position" else picked)
    return torch.tensor(rows, dtype=torch.int64).reshape(features.shape[0], keep)


def worst_excess(features: Tensor, picked: list[int], dropped: Tensor, mode: str) -> float:
    """How far the float64 score of a pick lies above the best one there was, at worst over the steps.

    infinity when a pick is not allowed: dropped, picked before, or ranked last while others are left.
    """
    similarity, last = similarities(features)
    total = torch.zeros_like(similarity[0]) if mode == "max_sum" else torch.full_like(similarity[0], -math.inf)
    free = ~dropped
    worst = 0.0
    for step, j in enumerate(picked):
        candidates = free & ~last
        if not free[j] or (step > 0 and last[j] and candidates.any()):
            return math.inf
        if step > 0 and not last[j]:
            worst = max(worst, float(total[j] - total[candidates].min()))
        free[j] = False
        total = combine(total, similarity[j], mode)
    return worst
