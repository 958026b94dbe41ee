"""LOOK-M's merge: what leaves the cache after prefill is folded into the most similar entries that stay.

The method's selection (text first, then what the prompt attends to) and its place, the cache, wait for the cache stage;
this is the merge alone.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vtkernels import merge_apply, nearest_match

_REDUCE = {"averaged": "mean", "pivotal": "pivot", "weighted": "similarity_weighted"}


def merge_evicted(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    mode: Literal["averaged", "pivotal", "weighted"] = "pivotal",
    *,
    selective: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merges every evicted cache entry into the kept one of its head whose key is most similar (cosine).

    Over an entry c and the n evicted e that chose it, keys and values by the same choice:
    ``averaged``: ``(c + sum e) / (n + 1)``; ``pivotal``: ``(c + sum (e + c) / 2) / (n + 1)``;
    ``weighted``: ``(c + sum s * e) / (n + 1)`` with s the cosine of the keys.

    Args:
        key, value: [B, H, S, D], after rotation.
        kept: int64 [B, H, K], ascending; heads may keep different entries.
        selective: ``weighted`` first drops the evicted entries whose cosine, averaged over the heads that evict the
            position, is below the mean over all positions, as the released code does (which averages the i-th
            evicted of each head, whatever its position). False: the paper's formula.

    Returns:
        Keys and values [B, H, K, D].

    LOOK-M (arXiv:2406.18139): verified, read in the authors' code and the paper.
    """
    if mode not in _REDUCE:
        raise ValueError(f"lookm: expected mode to be one of {', '.join(_REDUCE)}, got {mode!r}")
    batch, heads, _, _ = key.shape
    centers = kept.flatten(0, 1)
    owner, similarity = nearest_match(key.detach().flatten(0, 1), centers)
    if mode == "weighted" and selective:
        owner = _similar_enough(owner, similarity, centers, heads)
    weight = similarity if mode == "weighted" else None
    center = None if mode == "averaged" else centers

    def merged(part: Tensor) -> Tensor:
        rows, _ = merge_apply(
            part.flatten(0, 1), owner, kept.shape[2], weight=weight, reduce=_REDUCE[mode], center=center
        )
        return rows.unflatten(0, (batch, heads))

    return merged(key), merged(value)


def _similar_enough(owner: Tensor, similarity: Tensor, centers: Tensor, heads: int) -> Tensor:
    """``owner`` without the evicted positions below the mean similarity of their prompt."""
    evicted = similarity.new_ones(similarity.shape).scatter(1, centers, 0.0).unflatten(0, (-1, heads))
    per_head = similarity.unflatten(0, (-1, heads)) * evicted
    times = evicted.sum(1)
    average = per_head.sum(1) / times.clamp(min=1)
    mean = (average.sum(1) / (times > 0).sum(1).clamp(min=1)).unsqueeze(1)
    drop = ((average < mean).unsqueeze(1) & (evicted > 0)).flatten(0, 1)
    return owner.masked_fill(drop, -1)
