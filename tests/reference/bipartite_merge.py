"""bipartite_merge from its definition, in float64: match, then the size-weighted mean of every group."""

from __future__ import annotations

from torch import Tensor

from tests.reference.bipartite_match import bipartite_match, split
from tests.reference.merge_apply import merge_apply


def merges(count: int, r: int, protect: Tensor | None) -> int:
    """r clamped to what the shape and every row of the batch allow."""
    rows = [None, *([] if protect is None else protect)]
    splits = [split(count, row, None) for row in rows]
    return min([r] + [len(sources) if destinations else 0 for sources, destinations in splits])


def bipartite_merge(
    tokens: Tensor,
    metric: Tensor,
    r: int,
    size: Tensor | None = None,
    protect: Tensor | None = None,
    order: str = "position",
) -> tuple[Tensor, Tensor, Tensor]:
    r = merges(tokens.shape[1], r, protect)
    owner, _ = bipartite_match(metric, r, protect, order=order)
    return *merge_apply(tokens, owner, tokens.shape[1] - r, size), owner
