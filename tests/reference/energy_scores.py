"""energy_scores from its definition, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_NORM = 2.0**-63  # squared: the smallest normal float32


def response(cosine: float, kind: str, margin: float, alpha: float) -> float:
    if kind == "gaussian":
        sigma = 1 - margin
        return math.exp(-0.5 * ((1 - cosine) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    above = cosine - margin
    return above if above > 0 else alpha * (math.exp(above) - 1)


def cosine(x: Tensor, y: Tensor) -> float:
    norms = x.norm(), y.norm()
    return 0.0 if min(norms) < MIN_NORM else float(x @ y / norms[0] / norms[1])


def energy_scores(
    metric: Tensor, margin: float = 0.9, kind: str = "elu", alpha: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    out = torch.full(metric.shape[:2], -math.inf, dtype=torch.float64)
    for b, tokens in enumerate(metric.double()):
        named = [n for n in range(len(tokens)) if valid is None or valid[b, n]]
        usable = [n for n in named if tokens[n].square().sum() < 2.0**128]
        out[b, named] = math.nan
        for i in usable:
            total = sum(response(cosine(tokens[i], tokens[j]), kind, margin, alpha) for j in usable)
            out[b, i] = total / len(usable)
    return out
