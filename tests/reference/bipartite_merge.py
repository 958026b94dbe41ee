"""bipartite_merge from its definition, in float64: match, then the size-weighted mean of every group."""

from __future__ import annotations

from torch import Tensor

from tests.reference.bipartite_match import bipartite_match, bipartite_match_varlen, parts
from tests.reference.merge_apply import merge_apply


def merges(count: int, r: int, protect: Tensor | None) -> int:
    """r clamped to what the shape and every row of the batch allow."""
    rows = [None, *([] if protect is None else protect)]
    splits = [parts(count, row, None) for row in rows]
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


def bipartite_merge_varlen(
    tokens: Tensor,
    metric: Tensor,
    cu_seqlens: Tensor,
    r: Tensor,
    size: Tensor | None = None,
    out_len: int | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    owner, _, cu_merged = bipartite_match_varlen(metric, cu_seqlens, r, **options)
    rows = int(cu_merged[-1]) if out_len is None else out_len
    merged, total = merge_apply(tokens[None], owner[None], rows, None if size is None else size[None])
    return merged[0], total[0], owner, cu_merged
