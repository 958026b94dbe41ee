"""rule_attention from its definition: a softmax under a mask, the mask being the definition for all pairs at once."""

from __future__ import annotations

import torch
from torch import Tensor


def sees(t: Tensor, j: Tensor, numbers: list[int]) -> Tensor:
    """bool [Q, N]: whether the queries at positions ``t [Q, 1]`` see the keys at positions ``j [1, N]``."""
    sink, window, unit, stride, phase = numbers
    own_unit = (t - sink).clamp(min=0) // unit
    seen = (j < sink) | (j >= sink + (own_unit - window + 1) * unit)
    if stride > 0:
        seen = seen | ((j // 64 + phase + 1) % stride == 0)
    return seen & (j >= 0) & (j <= t)


def masked(query, key, value, mask, scale=None, key_bias=None, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Attention where bool ``mask [B, H, Q, N]`` is set: out and lse. ``dtype`` is the arithmetic."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.to(dtype) for x in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)))
    logits = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        logits = logits + key_bias[:, None, None].to(dtype)
    logits = logits.masked_fill(~mask, -torch.inf)
    if logits.shape[-1] == 0:
        return torch.zeros(query.shape, dtype=dtype), torch.full(query.shape[:3], -torch.inf, dtype=dtype)
    unseen = (logits == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(unseen, 0.0), -1).masked_fill(unseen, 0.0)
    return weights @ v, torch.logsumexp(logits, -1)


def rule_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Tensor,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    starts_k: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    mask = torch.zeros(batch, heads, rows, keys, dtype=torch.bool)
    i, n = torch.arange(rows)[:, None], torch.arange(keys)[None]
    for b in range(batch):
        start = 0 if starts_k is None else int(starts_k[b])
        length = keys if seqlens_k is None else int(seqlens_k[b])
        for h in range(heads):
            t = i + length - rows - start
            mask[b, h] = sees(t, n - start, rule[h % rule.shape[0]].tolist()) & (n < length)
    return masked(query, key, value, mask, scale, key_bias, dtype)
