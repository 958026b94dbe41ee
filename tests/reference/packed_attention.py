"""packed_attention in float64: unpack, append the residual, attend."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tests.reference import kv


def unpacked(codes: Tensor, meta: Tensor, scheme: str, axis: str, is_key: bool, k_order, head_dim, dtype, group):
    """float64 ``[B, Hk, N, D]``"""
    options = {"k_scheme": "none", "v_scheme": "none", "group": group, "head_dim": head_dim}
    side = "k" if is_key else "v"
    options |= {f"{side}_scheme": scheme, f"{side}_axis": axis}
    if scheme == "none":
        return kv.kv_unpack(codes, meta, codes, meta, dtype=dtype, **options)[not is_key].double()
    batch, heads, pages = codes.shape[:3]
    order = np.broadcast_to(np.arange(head_dim) if k_order is None else k_order.numpy(), (batch, heads, head_dim))
    x = np.empty((batch, heads, pages * kv.PAGE, head_dim))
    for b, h, n in np.ndindex(batch, heads, pages):
        data, scales = codes[b, h, n].contiguous().numpy(), meta[b, h, n].numpy()
        page = kv.unpack_page(data, scales, scheme, group, axis, is_key, order[b, h], head_dim)
        x[b, h, n * kv.PAGE : (n + 1) * kv.PAGE] = page
    return torch.from_numpy(x)


def attend(query, k, v, residual: int, causal: bool, scale: float | None):
    """In the dtype of its arguments; the last ``residual`` tokens may be hidden by ``causal``."""
    heads, rows = query.shape[1:3]
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = query @ k.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        token, row = torch.arange(k.shape[2]), torch.arange(rows)[:, None]
        logits = logits.masked_fill(token > k.shape[2] - rows + row, -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().nan_to_num(0) if k.shape[2] == 0 else logits.softmax(-1)
    return weights @ v, lse


def packed_attention(
    query, k_codes, k_meta, v_codes, v_meta, *, k_scheme, v_scheme, group=64, k_axis="channel", v_axis="channel",
    k_order=None, k_residual=None, v_residual=None, causal=False, scale=None,
):  # fmt: skip
    head_dim = query.shape[3]
    k = unpacked(k_codes, k_meta, k_scheme, k_axis, True, k_order, head_dim, query.dtype, group)
    v = unpacked(v_codes, v_meta, v_scheme, v_axis, False, None, head_dim, query.dtype, group)
    residual = 0 if k_residual is None else k_residual.shape[2]
    if k_residual is not None:
        k, v = torch.cat([k, k_residual.double()], 2), torch.cat([v, v_residual.double()], 2)
    return attend(query.double(), k, v, residual, causal, scale)
