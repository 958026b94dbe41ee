"""attention_scores from its formula, one query row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def row_probabilities(logits: Tensor, seen: Tensor, lse: Tensor | None) -> Tensor:
    """[N] logits of one row to the probabilities of the keys it sees; the others have 0."""
    out = torch.zeros_like(logits)
    if lse is not None:
        out[seen] = torch.zeros_like(logits[seen]) if lse == -torch.inf else torch.exp(logits[seen] - lse)
    elif seen.any():
        shown = logits[seen]
        out[seen] = torch.zeros_like(shown) if (shown == -torch.inf).all() else torch.softmax(shown, -1)
    return out


def reduce(x: Tensor, dim: int, how: str) -> Tensor:
    if how == "max":
        return x.amax(dim)
    return x.sum(dim) / x.shape[dim] if how == "mean" else x.sum(dim)


def attention_scores(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    lse: Tensor | None = None,
    head_reduce: str = "mean",
    query_reduce: str = "mean",
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``dtype`` is the arithmetic: float64 for the reference, the inputs' own for the error of plain torch."""
    batch, heads, rows, depth = query.shape
    keys = key.shape[2]
    scale = depth**-0.5 if scale is None else scale
    result = torch.zeros(batch, heads, keys, dtype=dtype)
    for b in range(batch):
        allowed = torch.ones(keys, dtype=torch.bool) if key_mask is None else key_mask[b]
        voters = range(rows) if query_mask is None else query_mask[b].nonzero()[:, 0].tolist()
        for h in range(heads):
            q, k = query[b, h].to(dtype), key[b, h // (heads // key.shape[1])].to(dtype)
            logits = q @ k.T * scale
            votes = []
            for i in voters:
                seen = allowed & (torch.arange(keys) <= keys - rows + i) if causal else allowed
                votes.append(row_probabilities(logits[i], seen, None if lse is None else lse[b, h, i].to(dtype)))
            if votes and keys:
                result[b, h] = reduce(torch.stack(votes), 0, query_reduce)
    return result if head_reduce == "none" else reduce(result, 1, head_reduce)
