"""select_cover from its definition, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gain_left(gains: Tensor, covered: Tensor) -> Tensor:
    """[R, N] and [R] to [N]: what each token would add. infinity - infinity adds nothing."""
    return (gains - covered[:, None]).nan_to_num(0.0, posinf=math.inf).clamp_min(0.0).sum(0)


def select_cover(gains: Tensor, keep: int, drop_mask: Tensor | None = None, order: str = "position") -> Tensor:
    rows = []
    for b in range(gains.shape[0]):
        table = gains[b].double().nan_to_num(0.0, posinf=math.inf, neginf=-math.inf)
        free = torch.ones(gains.shape[2], dtype=torch.bool) if drop_mask is None else ~drop_mask[b]
        covered, picked = torch.zeros(gains.shape[1], dtype=torch.float64), []
        for _ in range(keep):
            value = gain_left(table, covered)
            best = int((free & (value == value[free].max())).nonzero()[0])
            picked.append(best)
            free[best] = False
            covered = torch.maximum(covered, table[:, best])
        rows.append(sorted(picked) if order == "position" else picked)
    return torch.tensor(rows, dtype=torch.int64).reshape(gains.shape[0], keep)


def worst_shortfall(gains: Tensor, picked: list[int], dropped: Tensor) -> float:
    """How far the float64 value of a pick lies below the best one there was, relative to the best first value.

    infinity when a pick is dropped or was picked before.
    """
    table = gains.double()
    free, covered, worst, scale = ~dropped, torch.zeros(gains.shape[0], dtype=torch.float64), 0.0, 0.0
    for j in picked:
        if not free[j]:
            return math.inf
        value = gain_left(table, covered)
        best = float(value[free].max())
        scale = scale or best or 1.0
        worst = max(worst, (best - float(value[j])) / scale)
        free[j] = False
        covered = torch.maximum(covered, table[:, j])
    return worst
