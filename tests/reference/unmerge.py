"""unmerge from its definition."""

from __future__ import annotations

import torch
from torch import Tensor


def unmerge(merged: Tensor, owner: Tensor) -> Tensor:
    out = merged.new_zeros(*owner.shape, merged.shape[2])
    for b, n in torch.cartesian_prod(torch.arange(owner.shape[0]), torch.arange(owner.shape[1])).tolist():
        if owner[b, n] >= 0:
            out[b, n] = merged[b, owner[b, n]]
    return out
