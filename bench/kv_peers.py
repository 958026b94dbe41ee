"""What decodes from a low-bit cache elsewhere: unpack everything, then attend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import cache_utils

from bench.harness import PeerMissing, compiled
from vtkernels.kv import KVFormat

_QUANTO_BITS = {"int4": 4, "int2": 2}
_KIVI_BITS = 2
Decode = Callable[[], Tensor]


def sdpa(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, k, v, enable_gqa=True)


def transformers_cache(format: KVFormat, query: Tensor, k: Tensor, v: Tensor) -> Callable[[], Decode]:
    """A step of transformers' quantized cache of as many bits (quanto, or its own fp8), then SDPA."""

    def build() -> Decode:
        if format.k_scheme == "fp8":
            layer = cache_utils.Fp8QuantizedLayer()
        elif format.k_scheme in _QUANTO_BITS:
            layer = cache_utils.QuantoQuantizedLayer(_QUANTO_BITS[format.k_scheme], residual_length=2)
        else:
            raise PeerMissing("transformers has no such scheme")
        layer.update(k, v)
        nothing = k[:, :, :0]

        def step() -> Tensor:
            return sdpa(query, *layer.update(nothing, nothing))

        return step

    return build


def kivi(format: KVFormat, query: Tensor, k: Tensor, v: Tensor) -> Callable[[], Decode]:
    """KIVI's 2-bit groups, four codes a byte, unpacked by compiled torch, then SDPA."""

    def build() -> Decode:
        if format.k_scheme != "int2":
            raise PeerMissing("KIVI's cache is of 2 bits here")
        sides = [_pack(k, 2, format.group), _pack(v, 3, format.group)]

        def step() -> Tensor:
            return sdpa(query, *(_unpack(*side, dim, query.dtype) for side, dim in zip(sides, (2, 3), strict=True)))

        return compiled(step)()

    return build


def _pack(x: Tensor, dim: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = x.float().unflatten(dim, (-1, group))
    low, high = groups.amin(dim + 1, keepdim=True), groups.amax(dim + 1, keepdim=True)
    scale = (high - low) / (2**_KIVI_BITS - 1)
    codes = ((groups - low) / scale).round().to(torch.uint8).unflatten(dim + 1, (-1, 4))
    first, second, third, fourth = codes.unbind(dim + 2)
    return first | second << 2 | third << 4 | fourth << 6, scale.half(), low.half()


def _unpack(packed: Tensor, scale: Tensor, low: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=dim + 2).flatten(dim + 1, dim + 2)
    return (codes.to(dtype) * scale.to(dtype) + low.to(dtype)).flatten(dim, dim + 1)
