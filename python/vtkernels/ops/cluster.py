"""The merge family, by whole sequences: clusters of tokens, and segments of frames. Owner maps as in ops/merge.py."""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_segments(similarity: Tensor, *, threshold: float, max_window: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts a video into segments of consecutive frames so that storing what stands still once saves the most tokens.

    A position is static in a segment of at least two frames when ``similarity > threshold`` over every pair of adjacent
    frames in it. ``gain = static positions * (frames - 1)``, 0 for one frame; the cut has the largest sum of gains.
    Among cuts of the first frames with the same sum, the one whose last segment is the shortest stands. Nothing is
    synchronised and every shape is fixed.

    Args:
        similarity: float32, float16 or bfloat16 ``[B, F - 1, S]``: of each position in frame f to the same position in
            frame f + 1. Any batch and frame strides, contiguous last dimension; ``F * S < 2^31``. NaN is not similar.
        threshold: as float32.
        max_window: the most frames of a segment, at least 1.

    Returns:
        ``segment`` int64 ``[B, F]``: the segment of each frame, ascending from 0; ``is_static`` bool ``[B, F, S]``: the
        static positions of its segment; ``gain`` int64 ``[B]``: the tokens saved in total.

    Raises:
        RuntimeError: a shape, dtype or option that does not fit, a NaN ``threshold``, naming the argument.

    Segments as ``cu_seqlens``, without a synchronisation (those that do not exist are empty, at the end)::

        torch.searchsorted(segment, torch.arange(F + 1, device=segment.device).expand(B, -1).contiguous())

    Example:
        >>> pairs = [[0.9, 0.9, 0.2, 0.9], [0.9, 0.9, 0.9, 0.1], [0.1, 0.2, 0.3, 0.1], [0.95, 0.95, 0.95, 0.95]]
        >>> segment, is_static, gain = temporal_segments(torch.tensor([pairs]), threshold=0.8)
        >>> segment.tolist(), is_static[0, :, 2].tolist(), gain.tolist()
        ([[0, 0, 0, 1, 1]], [False, False, False, True, True], [8])

    HoliTom (arXiv 2505.21334).
    """
    return torch.ops.vtk.temporal_segments.default(similarity, threshold=threshold, max_window=max_window)


def cluster_dpc_knn(
    tokens: Tensor, clusters: int, *, k: int = 7, valid: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chooses density peaks as centers and gives every other token to its nearest center.

    With ``d(i, j) = |x_i - x_j| / sqrt(D)``: ``density_i = exp(-mean d(i, j)^2)`` over the k nearest, i itself too;
    ``delta_i`` is the distance to the nearest denser token, or the largest distance of all for the densest; the tokens
    with the highest ``density * delta`` are the centers. Of equal densities the lower token counts as the denser, which
    with two neighbours decides every mutual pair (the published code adds random noise for it); of equal scores the
    lower token wins, and a token between two centers goes to the lower one. A center is its own.

    Distances are float32 sums of squared differences, so equal tokens have distance 0. Scores are compared as
    logarithms, so that a density too small for float32 keeps its rank.

    Args:
        tokens: float32, float16 or bfloat16 ``[B, N, D]``, D >= 1; any batch and token strides, contiguous last
            dimension.
        clusters: centers of each row, ``0 <= clusters <= N``.
        k: neighbours of the density, 1 to 32; at most as many as the row has centers.
        valid: bool ``[B, N]``; False tokens take no part. Default: all do.
        counts: int32 ``[B]``: centers of each row, at most ``clusters``. Default: ``clusters``.

    Returns:
        ``centers`` int64 ``[B, clusters]``: tokens in ascending order, then -1 where the row has fewer; ``owner`` int64
        ``[B, N]``: the cluster of each token, -1 where it takes no part. That is also so for a token with a NaN, an
        infinity, or a norm above 6.5e18; without any center every owner is -1.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, naming the argument; on the CPU also a count
            outside ``0 <= counts <= clusters``, which CUDA clamps, because a report needs a synchronisation.

    Extra memory: ``4 * k + 32`` bytes a token; on the CPU also ``4 * N^2`` for each row in work up to N = 1024, a panel
    of at most 1 MiB beyond.

    Example:
        >>> tokens = torch.tensor([[[0.0], [1.0], [2.0], [10.0], [11.0]]])
        >>> centers, owner = cluster_dpc_knn(tokens, 2)
        >>> centers.tolist(), owner.tolist()
        ([[0, 3]], [[0, 0, 0, 1, 1]])

    HoliTom (arXiv 2505.21334); DPC-KNN.
    """
    return torch.ops.vtk.cluster_dpc_knn.default(tokens, clusters, k=k, valid=valid, counts=counts)


def cluster_kmedoids(
    tokens: Tensor, clusters: int, *, iterations: int = 100, tolerance: float = 1e-6, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chooses tokens that stand for their clusters: k-medoids by Euclidean distance with farthest-first seeds.

    The seeds (KKZ): the token of the largest norm, then repeatedly the token farthest from its nearest medoid. Then, up
    to ``iterations`` times: every token goes to its nearest medoid, and the new medoid of a cluster is its token with
    the smallest sum of distances within the cluster; the iteration of a row ends once its medoids moved by less than
    ``tolerance`` in total. At last the medoids are sorted and every token goes to its nearest. Ties: the lower token;
    while iterating the earlier seed, at last the lower medoid.

    A medoid is nearest to itself, even where others lie on the same place, so medoids are distinct and no cluster is
    empty. Rows of a batch do not influence each other. Arithmetic is float32; on CUDA all iterations are one launch.

    Args:
        tokens: float32, float16 or bfloat16 ``[B, N, D]``, D >= 1; any batch and token strides, contiguous last
            dimension.
        clusters: medoids of each row, ``0 <= clusters <= N``.
        iterations: at most, ``>= 0``; 0 keeps the seeds.
        tolerance: ``>= 0``; with 0 every iteration runs.
        valid: bool ``[B, N]``; False tokens take no part. Default: all do.

    Returns:
        ``medoids`` int64 ``[B, clusters]``: tokens in ascending order, then -1 where the row has fewer usable tokens;
        ``owner`` int64 ``[B, N]``: the cluster of each token, -1 where it takes no part. That is also so for a token
        with a NaN, an infinity, or a norm above 6.5e18.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, naming the argument.

    Extra memory: about 40 bytes a token; on the CPU also ``4 * N^2`` for each row in work up to N = 1024, a panel of at
    most 1 MiB beyond.

    Example:
        >>> tokens = torch.tensor([[[0.0], [1.0], [2.0], [10.0], [11.0]]])
        >>> medoids, owner = cluster_kmedoids(tokens, 2)
        >>> medoids.tolist(), owner.tolist()
        ([[1, 3]], [[0, 0, 0, 1, 1]])

    CenterCLIP (arXiv 2205.00823).
    """
    return torch.ops.vtk.cluster_kmedoids.default(
        tokens, clusters, iterations=iterations, tolerance=tolerance, valid=valid
    )


# Fakes. Shape errors are the real kernels' to word; a fake only refuses what would give a wrong output shape.


@torch.library.register_fake("vtk::temporal_segments")
def _(similarity, **_options):
    batch, pairs, positions = similarity.shape
    return (
        similarity.new_empty(batch, pairs + 1, dtype=torch.int64),
        similarity.new_empty(batch, pairs + 1, positions, dtype=torch.bool),
        similarity.new_empty(batch, dtype=torch.int64),
    )


def _clusters_like(op: str, tokens: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    batch, count, _ = tokens.shape
    torch._check(clusters >= 0 and clusters <= count, lambda: f"vtk::{op}: clusters = {clusters} of N tokens")
    return (
        tokens.new_empty(batch, clusters, dtype=torch.int64),
        tokens.new_empty(batch, count, dtype=torch.int64),
    )


@torch.library.register_fake("vtk::cluster_dpc_knn")
def _(tokens, clusters, **_options):
    return _clusters_like("cluster_dpc_knn", tokens, clusters)


@torch.library.register_fake("vtk::cluster_kmedoids")
def _(tokens, clusters, **_options):
    return _clusters_like("cluster_kmedoids", tokens, clusters)
