"""prune_gather from its definition: sort the tokens of one segment by (forced, score, -index) and take the first."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reduce_heads(scores: Tensor, head_reduce: str) -> Tensor:
    """[.., H, N] to [.., N], one float32 addition after the other, as the op documents."""
    if head_reduce == "max":
        return scores.float().amax(-2)
    total = scores.float()[..., 0, :]
    for head in range(1, scores.shape[-2]):
        total = total + scores.float()[..., head, :]
    return total / scores.shape[-2] if head_reduce == "mean" else total


def select(scores: list[float], keep: int, forced: list[bool], dropped: list[bool], order: str) -> list[int]:
    """Indices that one segment keeps."""

    def rank(token: int) -> tuple:
        # Ascending sort: forced first (whatever their score), NaN after -inf, the lower index first among equals.
        score = math.inf if forced[token] else scores[token]
        return (not forced[token], math.isnan(score), 0.0 if math.isnan(score) else -score, token)

    ranked = sorted((t for t in range(len(scores)) if not dropped[t]), key=rank)[:keep]
    return sorted(ranked) if order == "position" else ranked


def prune_gather(
    tokens: Tensor,
    scores: Tensor,
    keep: int,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    head_reduce: str = "mean",
    order: str = "position",
) -> tuple[Tensor, Tensor]:
    if scores.dim() == 3:
        scores = reduce_heads(scores, head_reduce)
    none = torch.zeros(scores.shape, dtype=torch.bool)
    keep_mask, drop_mask = (none if m is None else m for m in (keep_mask, drop_mask))
    rows = [
        select(scores[b].float().tolist(), keep, keep_mask[b].tolist(), drop_mask[b].tolist(), order)
        for b in range(scores.shape[0])
    ]
    indices = torch.tensor(rows, dtype=torch.int64).reshape(scores.shape[0], keep)
    kept = torch.stack([tokens[b][indices[b]] for b in range(tokens.shape[0])]) if len(rows) else tokens[:, :keep]
    return kept, indices


def prune_gather_varlen(
    tokens: Tensor, scores: Tensor, cu_seqlens: Tensor, keep: Tensor, head_reduce: str = "mean", **options
) -> tuple[Tensor, Tensor, Tensor]:
    if scores.dim() == 2:
        scores = reduce_heads(scores, head_reduce)
    masks = {name: options.pop(name) for name in ("keep_mask", "drop_mask") if options.get(name) is not None}
    indices, cu_kept = [], [0]
    for begin, end, budget in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), keep.tolist(), strict=True):
        part = {name: mask[None, begin:end] for name, mask in masks.items()}
        _, picked = prune_gather(tokens[None, begin:end], scores[None, begin:end], budget, **part, **options)
        indices += (picked[0] + begin).tolist()
        cu_kept.append(len(indices))
    index = torch.tensor(indices, dtype=torch.int64)
    return tokens[index], index, torch.tensor(cu_kept, dtype=torch.int32)


def prune_gather_tensors(
    tensors: list[Tensor], scores: Tensor, keep: int, token_dims: list[int] | None = None, **options
) -> tuple[list[Tensor], Tensor]:
    _, indices = prune_gather(
        scores[..., None] if scores.dim() == 2 else scores[:, 0, :, None], scores, keep, **options
    )
    kept = []
    for tensor, dim in zip(tensors, token_dims or [1] * len(tensors), strict=True):
        batched = tensor.expand(*tensor.shape[: dim - 1], scores.shape[0], *tensor.shape[dim:]).movedim(dim - 1, 0)
        rows = [row.index_select(dim - 1, index) for row, index in zip(batched, indices, strict=True)]
        kept.append(torch.stack(rows, dim - 1))
    return kept, indices
