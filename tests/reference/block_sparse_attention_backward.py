"""The gradients of block_sparse_attention, by autograd of the masked softmax over all keys."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.block_sparse_attention import listed


def times_listed(
    shape: tuple[int, int, int, int],
    block_counts: Tensor,
    block_indices: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    full_counts: Tensor | None,
    full_indices: Tensor | None,
    column_counts: Tensor | None,
    column_indices: Tensor | None,
    seqlens_k: Tensor | None,
    token_offsets: bool,
) -> Tensor:
    """``[B, H, Q, N]``: how often each query attends to each key."""
    masked, open_ = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    batch, heads, rows, keys = shape
    step = 1 if token_offsets else block_k
    for b in range(batch):
        length = keys if seqlens_k is None else int(seqlens_k[b])
        for h in range(heads):
            for block in range(-(-rows // block_q)):
                queries = slice(block * block_q, (block + 1) * block_q)
                for entry in listed(block_counts, block_indices, b, h, block):
                    masked[b, h, queries, entry * step : entry * step + block_k] += 1
                for entry in listed(full_counts, full_indices, b, h, block):
                    open_[b, h, queries, entry * step : entry * step + block_k] += 1
                for entry in listed(column_counts, column_indices, b, h, block):
                    masked[b, h, queries, entry] += 1
        if causal:
            masked[b].tril_(length - rows)
        masked[b, :, :, length:] = 0
        open_[b, :, :, length:] = 0
    return masked + open_


def attend(query: Tensor, key: Tensor, value: Tensor, times: Tensor, bias: Tensor, scale: float):
    """out and lse, in the arithmetic of the inputs; a row without keys has out 0 and lse 0."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * scale + bias[:, None, None] + times.to(query.dtype).log()
    logits = logits.where(times > 0, -torch.inf)
    some = (logits != -torch.inf).any(-1, keepdim=True)
    logits = logits.where(some, 0)
    return torch.softmax(logits, -1).where(some, 0) @ value, torch.logsumexp(logits, -1).where(some[..., 0], 0)


def block_sparse_attention_backward(
    grad_out: Tensor,
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
    grad_lse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dtype`` is the arithmetic: float64 for the reference, the inputs' own for the error of plain torch."""
    lists = (block_counts, block_indices, block_q, block_k, causal, full_counts, full_indices)
    shape = (*query.shape[:3], key.shape[2])
    times = times_listed(shape, *lists, column_counts, column_indices, seqlens_k, token_offsets)
    bias = torch.zeros(query.shape[0], key.shape[2]) if key_bias is None else key_bias
    times = times * (bias != -torch.inf)[:, None, None]
    read = times.unflatten(1, (key.shape[1], -1)).sum((2, 3)) > 0 if query.shape[1] else times.sum(2) > 0
    q = query.detach().to(dtype).requires_grad_()
    # What no query attends to is not read, not even NaN.
    k, v = (x.detach().to(dtype).where(read[..., None], 0).requires_grad_() for x in (key, value))
    bias = bias.where(bias != -torch.inf, 0).to(dtype)
    out, lse = attend(q, k, v, times, bias, query.shape[-1] ** -0.5 if scale is None else scale)
    target = (out * grad_out.to(dtype)).sum()
    if grad_lse is not None:
        target = target + (lse * grad_lse.to(dtype)).sum()
    return torch.autograd.grad(target, (q, k, v))
