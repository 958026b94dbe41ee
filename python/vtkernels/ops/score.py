"""The score family: one score per key token."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    head_reduce: str = "mean",
    query_reduce: str = "mean",
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    return torch.ops.vtk.attention_scores(
        query,
        key,
        scale=scale,
        lse=lse,
        head_reduce=head_reduce,
        query_reduce=query_reduce,
        causal=causal,
        key_mask=key_mask,
        query_mask=query_mask,
    )
