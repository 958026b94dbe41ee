"""CenterCLIP: of the patches of a few consecutive frames, the medoids of their clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtkernels import cluster_kmedoids, merge_apply
from vtkernels.zoo.recipe import Context, Merged, Recipe


@dataclass(frozen=True)
class CenterCLIP(Recipe):
    """Consecutive frames form segments; the patches of a segment's f frames are clustered, ``keep * f`` clusters.

    k-medoids++ on Euclidean distances: the first medoid is the patch of largest norm, each next one the farthest from
    its nearest medoid; patches go to their nearest medoid, whose place takes the member with the smallest sum of
    distances to the others, until the medoids move less than ``tolerance``. Medoids stay in the order of their
    positions, each in the place of its frame; the other patches are dropped.

    Args:
        frames: of a segment; the last one of a video may be shorter. Published: 2 (12 frames to 6 segments) or 3.
        algorithm: ``kmedoids``, or ``spectral``: the same on the rows, normalised to 1, of the ``keep * f``
            eigenvectors of smallest eigenvalue of the symmetrically normalised Laplacian of
            ``exp(-|x - y|^2 / (2 sigma^2))``.
        sigma: of the spectral kernel.
        rows: ``medoid``, or ``mean``: each cluster's mean in the place of its medoid.
        tolerance, iterations: when the search ends.

    Deviations: the paper clusters inside one or two of the encoder's blocks and fine-tunes all of it; here its output
    is clustered. It also averages the frames' [CLS] tokens, which LLaVA's features do not have. The signs that the
    released code fixes in the eigenvectors change no distance, so they are left out; so is its graph of neighbours.
    """

    name: ClassVar[str] = "centerclip"
    title: ClassVar[str] = "CenterCLIP: Token Clustering for Efficient Text-Video Retrieval"
    reference: ClassVar[str] = "arXiv:2205.00823"
    status: ClassVar[str] = "verified: read in the authors' code; its place after the encoder is ours"
    merges: ClassVar[bool] = True
    video: ClassVar[bool] = True

    frames: int = 2
    algorithm: Literal["kmedoids", "spectral"] = "kmedoids"
    sigma: float = 2.0
    rows: Literal["medoid", "mean"] = "medoid"
    tolerance: float = 1e-6
    iterations: int = 80

    def __post_init__(self) -> None:
        self.one_of("algorithm", ("kmedoids", "spectral"))
        self.one_of("rows", ("medoid", "mean"))
        if self.frames < 1 or self.sigma <= 0:
            raise ValueError(f"centerclip: expected frames >= 1 and sigma > 0, got {self.frames} and {self.sigma}")

    def vision_encoder(self, ctx: Context) -> Merged:
        images, n, _ = ctx.tokens.shape
        rows: list[Tensor] = []
        counts, owner = [0] * images, torch.full((images, n), -1, device=ctx.tokens.device)
        for start, end in self._segments(ctx.videos):
            tokens = ctx.tokens[start:end].reshape(1, -1, ctx.tokens.shape[-1])
            medoids, cluster = self._cluster(tokens.detach(), ctx.keep * (end - start))
            if self.rows == "medoid":
                kept = tokens[0, medoids[0]]
                number = torch.arange(len(kept), device=kept.device).unsqueeze(0)
                cluster = torch.full_like(cluster, -1).scatter_(1, medoids, number)
            else:
                kept = merge_apply(tokens, cluster, medoids.shape[1], reduce="mean")[0][0]
            owner[start:end] = cluster.where(cluster < 0, cluster + sum(counts)).view(end - start, n)
            counts[start:end] = torch.bincount(medoids[0] // n, minlength=end - start).tolist()
            rows.append(kept)
        return Merged(torch.cat(rows), counts, owner)

    def _segments(self, videos: list[slice]) -> list[tuple[int, int]]:
        return [
            (start, min(start + self.frames, video.stop))
            for video in videos
            for start in range(video.start, video.stop, self.frames)
        ]

    def _cluster(self, tokens: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
        """Medoids int64 [1, clusters], ascending, and the cluster of each token, int64 [1, N]."""
        if self.algorithm == "spectral":
            tokens = _spectral(tokens[0], clusters, self.sigma).unsqueeze(0)
        return cluster_kmedoids(tokens, clusters, iterations=self.iterations, tolerance=self.tolerance)


def _spectral(tokens: Tensor, clusters: int, sigma: float) -> Tensor:
    """float32 [N, clusters]."""
    tokens = tokens.double()
    affinity = torch.exp(-torch.cdist(tokens, tokens).square() / (2 * sigma**2))
    scale = affinity.sum(1).rsqrt()
    laplacian = torch.eye(len(tokens), device=tokens.device) - scale.unsqueeze(1) * affinity * scale
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, :clusters]
    return (vectors / (vectors.norm(dim=1, keepdim=True) + 1e-6)).float().contiguous()
