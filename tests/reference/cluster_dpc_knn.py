"""cluster_dpc_knn from its definition, in float64, and what the clusterings' references share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def usable_tokens(tokens: Tensor, valid: Tensor | None) -> list[int]:
    """Of one row [N, D]."""
    named = [True] * len(tokens) if valid is None else valid.tolist()
    return [n for n, x in enumerate(tokens.double()) if named[n] and x.square().sum() < 2.0**125]


def squared_distances(x: Tensor) -> Tensor:
    """[N, D] to [N, N]."""
    return (x[:, None] - x[None]).square().sum(-1)


def nearest_center(squared: Tensor, centers: list[int]) -> list[int]:
    """Of each token [N]: the nearest center, the lower of equals; a center has itself."""
    owners = []
    for i in range(len(squared)):
        distances = [-1.0 if c == i else float(squared[i, c]) for c in centers]
        owners.append(distances.index(min(distances)))
    return owners


def density_peaks(x: Tensor, clusters: int, k: int) -> list[int]:
    squared = squared_distances(x) / x.shape[1]
    k = min(k, clusters)
    mean = [float(row.sort().values[:k].sum() / k) for row in squared]
    scores = []
    for i in range(len(x)):
        denser = [float(squared[i, j]) for j in range(len(x)) if (mean[j], j) < (mean[i], i)]
        delta = math.sqrt(min(denser) if denser else float(squared.max()))
        scores.append(math.exp(-mean[i]) * delta)
    return sorted(sorted(range(len(x)), key=lambda i: (-scores[i], i))[:clusters])


def cluster_dpc_knn(
    tokens: Tensor, clusters: int, k: int = 7, valid: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, count, _ = tokens.shape
    centers = torch.full((batch, clusters), -1)
    owner = torch.full((batch, count), -1)
    for b in range(batch):
        usable = usable_tokens(tokens[b], None if valid is None else valid[b])
        wanted = min(clusters if counts is None else int(counts[b]), len(usable))
        if wanted == 0:
            continue
        x = tokens[b, usable].double()
        chosen = density_peaks(x, wanted, k)
        centers[b, :wanted] = torch.tensor([usable[c] for c in chosen])
        owner[b, usable] = torch.tensor(nearest_center(squared_distances(x), chosen))
    return centers, owner
