"""The select family: scores (or features) to kept token indices, and the gather of the kept rows."""

from __future__ import annotations

import torch
from torch import Tensor


def prune_gather(
    tokens: Tensor,
    scores: Tensor,
    keep: int,
    *,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    head_reduce: str = "mean",
    order: str = "position",
) -> tuple[Tensor, Tensor]:
    return torch.ops.vtk.prune_gather.default(
        tokens, scores, keep, keep_mask=keep_mask, drop_mask=drop_mask, head_reduce=head_reduce, order=order)


def prune_gather_attention(
    tokens: Tensor,
    query: Tensor,
    key: Tensor,
    keep: int,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    head_reduce: str = "mean",
    query_reduce: str = "mean",
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    order: str = "position",
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.vtk.prune_gather.attention(
        tokens, query, key, keep, scale=scale, lse=lse, head_reduce=head_reduce, query_reduce=query_reduce,
        keep_mask=keep_mask, drop_mask=drop_mask, order=order)


def prune_gather_varlen(
    tokens: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    keep: Tensor,
    *,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    head_reduce: str = "mean",
    order: str = "position",
    total_keep: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.vtk.prune_gather.varlen(
        tokens, scores, cu_seqlens, keep, keep_mask=keep_mask, drop_mask=drop_mask, head_reduce=head_reduce,
        order=order, total_keep=total_keep)


def prune_gather_tensors(
    tensors: list[Tensor],
    scores: Tensor,
    keep: int,
    *,
    token_dims: list[int] | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    head_reduce: str = "mean",
    order: str = "position",
) -> tuple[list[Tensor], Tensor]:
    return torch.ops.vtk.prune_gather.tensors(
        tensors, scores, keep, token_dims=token_dims, keep_mask=keep_mask, drop_mask=drop_mask,
        head_reduce=head_reduce, order=order)


def select_diverse(
    features: Tensor,
    keep: int,
    seed: Tensor | None = None,
    *,
    mode: str = "max_min",
    drop_mask: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    return torch.ops.vtk.select_diverse(features, keep, seed, mode=mode, drop_mask=drop_mask, order=order)


def select_cover(gains: Tensor, keep: int, *, drop_mask: Tensor | None = None, order: str = "position") -> Tensor:
    return torch.ops.vtk.select_cover(gains, keep, drop_mask=drop_mask, order=order)
