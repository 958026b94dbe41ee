"""cluster_kmedoids from its definition, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.cluster_dpc_knn import nearest_center, squared_distances, usable_tokens


def seeds(x: Tensor, squared: Tensor, clusters: int) -> list[int]:
    """The largest norm, then the token farthest from its nearest seed; no token twice."""
    chosen = [int(x.square().sum(-1).argmax())]
    while len(chosen) < clusters:
        nearest = [-1.0 if i in chosen else float(squared[i, chosen].min()) for i in range(len(x))]
        chosen.append(nearest.index(max(nearest)))
    return chosen


def moved(squared: Tensor, medoids: list[int]) -> list[int]:
    """Each cluster's token with the smallest sum of distances."""
    owner = nearest_center(squared, medoids)
    result = []
    for k in range(len(medoids)):
        members = [i for i, own in enumerate(owner) if own == k]
        costs = [sum(float(squared[i, j].sqrt()) for j in members) for i in members]
        result.append(members[costs.index(min(costs))])
    return result


def medoids_of(x: Tensor, clusters: int, iterations: int, tolerance: float) -> list[int]:
    squared = squared_distances(x)
    medoids = seeds(x, squared, clusters)
    for _ in range(iterations):
        before, medoids = medoids, moved(squared, medoids)
        if float(squared[medoids, before].sqrt().sum()) < tolerance:
            break
    return sorted(medoids)


def cluster_kmedoids(
    tokens: Tensor, clusters: int, iterations: int = 100, tolerance: float = 1e-6, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, count, _ = tokens.shape
    medoids = torch.full((batch, clusters), -1)
    owner = torch.full((batch, count), -1)
    for b in range(batch):
        usable = usable_tokens(tokens[b], None if valid is None else valid[b])
        wanted = min(clusters, len(usable))
        if wanted == 0:
            continue
        x = tokens[b, usable].double()
        chosen = medoids_of(x, wanted, iterations, tolerance)
        medoids[b, :wanted] = torch.tensor([usable[c] for c in chosen])
        owner[b, usable] = torch.tensor(nearest_center(squared_distances(x), chosen))
    return medoids, owner
