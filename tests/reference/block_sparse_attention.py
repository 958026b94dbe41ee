"""block_sparse_attention from its definition: a softmax over explicitly listed keys, one query row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def listed(counts: Tensor | None, indices: Tensor | None, b: int, h: int, row: int) -> list[int]:
    """The entries of one list; a batch or head dimension of 1 is shared."""
    if counts is None:
        return []
    b, h = (0 if counts.shape[dim] == 1 else at for dim, at in ((0, b), (1, h)))
    b_index, h_index = (0 if indices.shape[dim] == 1 else at for dim, at in ((0, b), (1, h)))
    return indices[b_index, h_index, row, : counts[b, h, row]].tolist()


def row_keys(partial, full, columns, i, length, rows, block_k, causal, token_offsets) -> list[int]:
    """The keys that query ``i`` attends to, as often as they are listed."""

    def block(entry: int) -> range:
        start = entry if token_offsets else entry * block_k
        return range(start, min(start + block_k, length))

    last = i + length - rows if causal else length - 1
    keys = [n for entry in partial for n in block(entry) if n <= last]
    keys += [n for entry in full for n in block(entry)]
    return keys + [n for n in columns if n <= last and n < length]


def attend(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) @ values and the log-sum-exp: zeros and -inf where no key is left."""
    seen = logits != -torch.inf
    if not seen.any():
        return values.new_zeros(values.shape[1]), logits.new_tensor(-torch.inf)
    # A key with weight 0 does not bring its value in, not even NaN.
    return torch.softmax(logits[seen], 0) @ values[seen], torch.logsumexp(logits[seen], 0)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_counts: Tensor,
    block_indices: Tensor,
    block_q: int = 128,
    block_k: int = 128,
    causal: bool = False,
    scale: float | None = None,
    full_counts: Tensor | None = None,
    full_indices: Tensor | None = None,
    column_counts: Tensor | None = None,
    column_indices: Tensor | None = None,
    key_bias: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    token_offsets: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``dtype`` is the arithmetic: float64 for the reference, the inputs' own for the error of plain torch."""
    batch, heads, rows, depth = query.shape
    group = heads // key.shape[1] if heads else 1
    scale = depth**-0.5 if scale is None else scale
    outs, sums = [], []
    for b in range(batch):
        length = key.shape[2] if seqlens_k is None else int(seqlens_k[b])
        for h in range(heads):
            q, k, v = (x.to(dtype) for x in (query[b, h], key[b, h // group], value[b, h // group]))
            logits = q @ k.T * scale
            if key_bias is not None:
                logits = logits + key_bias[b].to(dtype)
            for i in range(rows):
                lists = [
                    listed(counts, indices, b, h, i // block_q)
                    for counts, indices in (
                        (block_counts, block_indices),
                        (full_counts, full_indices),
                        (column_counts, column_indices),
                    )
                ]
                keys = row_keys(*lists, i, length, rows, block_k, causal, token_offsets)
                out, lse = attend(logits[i, keys], v[keys])
                outs.append(out)
                sums.append(lse)
    if not outs:
        return torch.zeros(query.shape, dtype=dtype), torch.zeros(query.shape[:3], dtype=dtype)
    return torch.stack(outs).view(query.shape), torch.stack(sums).view(query.shape[:3])
