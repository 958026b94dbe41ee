"""energy_scores from its definition, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_NORM = 2.0**-63  # squared: the smallest normal float32


def cosines(tokens: Tensor) -> Tensor:
    """[N, C] to [N, N], 0 for zero vectors."""
    norm = tokens.norm(dim=-1, keepdim=True)
    unit = torch.where(norm < MIN_NORM, 0.0, tokens / norm)
    return unit @ unit.T


def response(cosine: Tensor, kind: str, margin: float, alpha: float) -> Tensor:
    if kind == "gaussian":
        sigma = 1 - margin
        return (-0.5 * ((1 - cosine) / sigma) ** 2).exp() / (sigma * math.sqrt(2 * math.pi))
    above = cosine - margin
    return torch.where(above > 0, above, alpha * (above.exp() - 1))


def energy_scores(
    metric: Tensor, margin: float = 0.9, kind: str = "elu", alpha: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    out = torch.full(metric.shape[:2], -math.inf, dtype=torch.float64)
    for b, tokens in enumerate(metric.double()):
        named = torch.ones(len(tokens), dtype=torch.bool) if valid is None else valid[b]
        usable = named & (tokens.square().sum(-1) < 2.0**128)
        out[b, named] = math.nan
        out[b, usable] = response(cosines(tokens[usable]), kind, margin, alpha).mean(-1)
    return out
