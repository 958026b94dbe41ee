"""Clusters and segments against the torch formulations: cdist and topk, a loop over iterations, a loop over windows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.harness import Case, compiled

OPS = ["temporal_segments", "cluster_dpc_knn", "cluster_kmedoids"]


def eager_dpc_knn(tokens: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """As HoliTom ships it, with the lower token for the random tie-breaker."""
    distance = torch.cdist(tokens, tokens) / tokens.shape[2] ** 0.5
    nearest = distance.topk(min(7, clusters), dim=-1, largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    lower = torch.ones_like(distance[0], dtype=torch.bool).tril(-1)
    denser = (density[:, None, :] > density[:, :, None]) | ((density[:, None, :] == density[:, :, None]) & lower)
    delta = distance.where(denser, distance.flatten(1).amax(-1)[:, None, None]).amin(-1)
    centers = (density * delta).topk(clusters, dim=-1).indices.sort(-1).values
    to_center = distance.gather(2, centers[:, None].expand(-1, tokens.shape[1], -1))
    owner = to_center.argmin(-1)
    return centers, owner.scatter(1, centers, torch.arange(clusters, device=tokens.device).expand_as(centers))


def eager_kmedoids(tokens: Tensor, clusters: int, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """One item after the other, the matrix stored; the clusters of an iteration by one masked sum."""
    medoid_rows, owner_rows = [], []
    for x in tokens:
        distance = torch.cdist(x, x)
        own = distance.clone().fill_diagonal_(-1)
        chosen, nearest = [int(x.norm(dim=-1).argmax())], torch.full_like(own[0], torch.inf)
        while len(chosen) < clusters:
            nearest = torch.minimum(nearest, own[chosen[-1]])
            chosen.append(int(nearest.argmax()))
        medoids = torch.tensor(chosen, device=x.device)
        ids = torch.arange(clusters, device=x.device)[:, None]
        for _ in range(iterations):
            cluster = own[:, medoids].argmin(-1)
            cost = distance.where(cluster[:, None] == cluster, 0).sum(-1)
            before, medoids = medoids, cost.where(cluster == ids, torch.inf).argmin(-1)
            if (x[medoids] - x[before]).norm(dim=-1).sum() < 1e-6:
                break
        medoids = medoids.sort().values
        medoid_rows.append(medoids)
        owner_rows.append(own[:, medoids].argmin(-1))
    return torch.stack(medoid_rows), torch.stack(owner_rows)


def eager_segments(similarity: Tensor, threshold: float) -> Tensor:
    """The dynamic programme of HoliTom, a row of the window table at a time; returns the gains."""
    gains = []
    for similar in similarity > threshold:
        total = [0]
        for end in range(1, len(similar) + 2):
            still = similar[: end - 1].flip(0).cummin(0).values.sum(-1).tolist()
            total.append(max([total[end - 1]] + [total[end - 2 - n] + c * (n + 1) for n, c in enumerate(still)]))
        gains.append(total[-1])
    return torch.tensor(gains, device=similarity.device)


def check_same(share: float):
    """Both outputs agree in so many places: rounding decides between tokens that are nearly as good."""

    def check(ours: object, peer: object) -> None:
        for mine, theirs in zip(ours, peer, strict=True):
            same = (mine == theirs).float().mean().item()
            if same < share:
                raise AssertionError(f"only {same:.1%} agree")

    return check


def video_tokens(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Unit-scale tokens around a few dozen places, so that clusters exist."""
    random = torch.Generator(device).manual_seed(0)
    batch, count, width = shape
    places = torch.randn(batch, 40, width, generator=random, device=device)
    which = torch.randint(40, (batch, count), generator=random, device=device)
    noise = torch.randn(shape, generator=random, device=device)
    return places.gather(1, which[..., None].expand(shape)) + 0.5 * noise


def dpc_case(shape: tuple[int, int, int], clusters: int, device: torch.device) -> Case:
    tokens = video_tokens(shape, device)
    return Case(
        "cluster_dpc_knn",
        f"{list(shape)} float32 clusters {clusters}",
        lambda: torch.ops.vtk.cluster_dpc_knn.default(tokens, clusters),
        {
            "eager": lambda: lambda: eager_dpc_knn(tokens, clusters),
            "inductor": compiled(eager_dpc_knn, tokens, clusters),
        },
        check_same(0.9),
        bytes=tokens.nbytes + 8 * shape[0] * (shape[1] + clusters),
        flops=shape[0] * shape[1] ** 2 * shape[2],
        target={"eager": 1.0},
    )


def kmedoids_case(shape: tuple[int, int, int], clusters: int, device: torch.device) -> Case:
    tokens = video_tokens(shape, device)
    return Case(
        "cluster_kmedoids",
        f"{list(shape)} float32 clusters {clusters}",
        lambda: torch.ops.vtk.cluster_kmedoids.default(tokens, clusters),
        {"eager": lambda: lambda: eager_kmedoids(tokens, clusters)},
        check_same(0.9),
        bytes=tokens.nbytes + 8 * shape[0] * (shape[1] + clusters),
        flops=shape[0] * shape[1] ** 2 * shape[2],
        target={"eager": 2.0},
    )


def segments_case(frames: int, positions: int, device: torch.device) -> Case:
    random = torch.Generator(device).manual_seed(0)
    similarity = 0.7 + 0.3 * torch.rand(1, frames - 1, positions, generator=random, device=device)

    def check(ours: object, peer: object) -> None:
        assert torch.equal(ours[2], peer)

    return Case(
        "temporal_segments",
        f"F {frames} S {positions} float32",
        lambda: torch.ops.vtk.temporal_segments.default(similarity, threshold=0.8),
        {"eager": lambda: lambda: eager_segments(similarity, 0.8)},
        check,
        bytes=similarity.nbytes + frames * (positions + 8),
        target={"eager": 10.0},
    )


def cases(device: torch.device) -> Iterator[Case]:
    for frames in (32, 256):
        yield segments_case(frames, 196, device)
    # The static tokens of HoliTom's segments, all tokens of a frame of LLaVA-NeXT, a set beyond the stored matrix.
    for shape, clusters in (((8, 196, 896), 20), ((1, 576, 1024), 58), ((1, 2304, 256), 64)):
        yield dpc_case(shape, clusters, device)
    # CenterCLIP on ViT-B/32: 12 frames in 6 segments, or in 4.
    for shape in ((6, 98, 768), (4, 147, 768), (1, 588, 768)):
        yield kmedoids_case(shape, 49, device)
