"""What other methods read back from their caches, as plain formulas on float32 ``[B, H, N, D]``, N a multiple of 32.

From the authors' code: VidKV (arXiv 2503.16257), KIVI (arXiv 2402.02750), TurboQuant as vLLM has it (arXiv 2504.19874).
Metadata are rounded to float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def asymmetric(x: Tensor, bits: int, dim: int, group: int = GROUP) -> Tensor:
    """``s round((x - min) / s) + min``, ``s = (max - min) / (2^bits - 1)``, over groups along ``dim``: 2 or 3."""
    groups = x.unflatten(dim, (-1, group))
    low, high = groups.amin(dim + 1, keepdim=True), groups.amax(dim + 1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    codes = ((groups - low) / scale.where(scale > 0, 1)).round()
    return (codes * _half(scale) + _half(low)).flatten(dim, dim + 1)


def kivi(k: Tensor, v: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Keys over groups of tokens of a channel, values over groups of channels of a token."""
    return asymmetric(k, bits, 2), asymmetric(v, bits, 3, min(GROUP, v.shape[3]))


def vidkv(k: Tensor, v: Tensor, *, released: bool) -> tuple[Tensor, Tensor]:
    """1.5-bit keys and 1.58-bit values over groups of 32 tokens of a channel, without token protection.

    Half of the channels, the same for all heads and batch items, have two bits; the others pass a complex Fourier
    transform over the channels, of which real and imaginary part of every frequency have one bit each: two a channel.
    ``released``: a sign reads back as 0 or s and a ternary code as -1, 0 or 1 without its scale; otherwise as -s or s
    and scaled, as documented.
    """
    return _vidkv_keys(k, released), _vidkv_values(v, released)


def _vidkv_keys(k: Tensor, released: bool) -> Tensor:
    flat = k.flatten(0, 2)
    spread = flat.amax(0) - flat.amin(0)
    easy = spread.argsort(descending=True, stable=True)[k.shape[3] // 2 :].sort().values
    out = asymmetric(k, 2, 2)
    waves = torch.view_as_real(torch.fft.fft(k[..., easy], dim=3)).unflatten(2, (-1, GROUP))
    scale = _half(waves.abs().mean(3, keepdim=True))
    coded = scale * torch.where(waves >= 0, 1.0, 0.0 if released else -1.0)
    out[..., easy] = torch.fft.ifft(torch.view_as_complex(coded.flatten(2, 3)), dim=3).real
    return out


def _vidkv_values(v: Tensor, released: bool) -> Tensor:
    groups = v.unflatten(2, (-1, GROUP))
    mean = groups.abs().mean(3, keepdim=True)
    codes = groups.sign().where(groups.abs() > 0.5 * mean, 0)
    return (codes if released else codes * _half(mean)).flatten(2, 3)


def turboquant(k: Tensor, v: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Keys: norm times a rotated unit vector, every coordinate the nearest of a codebook for normal numbers, rescaled
    to unit norm. Values: uniform over each token and head.
    """
    width = k.shape[3]
    book = normal_codebook(bits) * width**-0.5
    rotation = _hadamard(width) * width**-0.5
    norm = k.norm(dim=3, keepdim=True)
    unit = (k / norm.where(norm > 0, 1)) @ rotation
    nearest = book[torch.bucketize(unit, (book[1:] + book[:-1]) / 2, right=True)]
    nearest = nearest / nearest.norm(dim=3, keepdim=True)
    return _half(norm) * (nearest @ rotation), asymmetric(v, bits, 3, width)


def normal_codebook(bits: int) -> Tensor:
    """Lloyd's: the ``2^bits`` values of the least squared error for normal numbers, ascending."""
    grid = torch.linspace(-6, 6, 20000, dtype=torch.float64)
    weight = torch.exp(-0.5 * grid**2)
    book = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    for _ in range(400):
        owner = torch.bucketize(grid, (book[1:] + book[:-1]) / 2)
        total = torch.zeros_like(book).index_add_(0, owner, weight)
        book = torch.zeros_like(book).index_add_(0, owner, weight * grid) / total
    return book.float()


def _hadamard(width: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
