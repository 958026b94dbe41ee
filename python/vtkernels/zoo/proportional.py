"""Proportional attention: a key that stands for several tokens weighs as many, through fused attention."""

from __future__ import annotations

import torch
from torch import Tensor


def size_bias(size: Tensor, *, valid: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The additive attention bias of merged tokens: ``softmax(q k / sqrt(d) + log(size_k))`` over the keys.

    A key of size s then takes part like s equal keys, so that attention over merged tokens is attention over the tokens
    that they stand for. It goes where an attention mask goes (torch's ``scaled_dot_product_attention``, transformers'
    ``attention_mask``, timm's ``attn_mask``); the attention stays fused and no weights are stored.

    Args:
        size: ``[B, N]``, how many tokens each key stands for, positive. Protected tokens have size 1, bias 0.
        valid: bool ``[B, N]``, False for padded keys, which then weigh nothing.
        dtype: that of the queries.

    Returns:
        ``[B, 1, 1, N]``, to be broadcast over heads and queries.

    Example:
        >>> query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4)
        >>> value = torch.eye(2).view(1, 1, 2, 2)
        >>> bias = size_bias(torch.tensor([[1.0, 3.0]]))
        >>> torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias).tolist()
        [[[[0.25, 0.75]]]]

    ToMe (arXiv 2210.09461).
    """
    bias = size.float().log()
    if valid is not None:
        bias = bias.where(valid, -torch.inf)
    return bias.to(dtype)[:, None, None, :]
