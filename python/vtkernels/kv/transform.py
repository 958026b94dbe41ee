"""Rotation of channels: outliers spread over all of them, so that few bits lose less."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor) -> Tensor:
    """An orthonormal transform of the last dimension: Hadamard matrices of the powers of two that sum up to it.

    For such a transform ``q . k = rotate(q) . rotate(k)``: rotated keys are packed, and queries are rotated before
    attention; nothing is undone. Its own inverse, so that ``rotate(attention(..., rotate(v)))`` serves values too. The
    same matrices, largest first, that a mix has for its one-bit channels (docs/kv.md).

    Args:
        x: floating point ``[..., D]``, D >= 1, after the position embedding.

    Returns:
        The shape and dtype of ``x``; computed in float32 (float64 stays float64).

    Example:
        >>> x = torch.tensor([8.0, 0.0, 0.0, 0.0])
        >>> rotate(x).tolist(), rotate(rotate(x)).tolist()
        ([4.0, 4.0, 4.0, 4.0], [8.0, 0.0, 0.0, 0.0])

    TurboQuant (arXiv 2504.19874) rotates keys before a scalar quantiser.
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    sizes, left = [], x.shape[-1]
    while left:
        sizes.append(1 << left.bit_length() - 1)
        left -= sizes[-1]
    return torch.cat([_hadamard(block) for block in wide.split(sizes, dim=-1)], dim=-1).to(x.dtype)


def _hadamard(x: Tensor) -> Tensor:
    size, step = x.shape[-1], 1
    y = x
    while step < size:
        low, high = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        step *= 2
    return y * size**-0.5
