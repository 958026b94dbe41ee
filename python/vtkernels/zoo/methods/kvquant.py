"""KVQuant: keys packed before their rotation, channel by channel, values token by token, outliers kept beside them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtkernels.kv import PAGE_TOKENS, KVFormat
from vtkernels.kv.pages import Pages
from vtkernels.zoo.caching import CacheContext
from vtkernels.zoo.recipe import Recipe


@dataclass(frozen=True)
class KVQuant(Recipe):
    """Keys are packed as they were before the rotary embedding, in groups along the tokens of a channel; values in
    groups along the channels of a token. Of every page of a head the share ``outliers`` of the keys farthest from their
    channel's mean in its standard deviations, and of the values farthest from their token's, is kept exactly, as index
    and number; codes are chosen without them. The first ``sinks`` tokens are kept exactly.

    Packed are codes, scales and the indices of outliers. Not read packed: at every step all pages are unpacked and keys
    rotated, for any attention (``unpack=True`` of :class:`vtkernels.cache.PackedKVCache`); what is saved is memory.

    Args:
        bits: 4 or 2.
        group: values that share a scale; for values it must divide the head dim.
        outliers: share of the numbers.
        sinks: tokens.

    Deviations from the released code: uniform codes between the least and the largest number of a group, where it has
    codebooks fitted to a calibration set (nuq); so ranges and outliers are those of each page, not calibrated. Indices
    are two bytes in a page. Positions are places in the cache: in padded or pruned prompts keys are turned by what
    these differ from the model's, and turned back by as much.
    """

    name: ClassVar[str] = "kvquant"
    title: ClassVar[str] = "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization"
    reference: ClassVar[str] = "arXiv:2401.18079"
    status: ClassVar[str] = "verified: axes, rotation, outliers, sinks; uniform codes and online ranges are ours"

    bits: int = 4
    group: int = 32
    outliers: float = 0.01
    sinks: int = 1

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise ValueError(f"kvquant: expected bits to be 2 or 4, got {self.bits}")
        if not 0 <= self.outliers <= 0.5:
            raise ValueError(f"kvquant: expected outliers in [0, 0.5], got {self.outliers}")
        if not 0 <= self.sinks <= PAGE_TOKENS:
            raise ValueError(f"kvquant: expected sinks in [0, {PAGE_TOKENS}], got {self.sinks}")
        self._format()

    def _format(self) -> KVFormat:
        return KVFormat(f"int{self.bits}", f"int{self.bits}", self.group, k_axis="channel", v_axis="token")

    def cache(self, ctx: CacheContext) -> Any:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        from vtkernels.cache import PackedKVCache

        make = functools.partial(
            UnrotatedPages.empty, rotary=LlamaRotaryEmbedding(ctx.config), outliers=self.outliers, sinks=self.sinks
        )
        return PackedKVCache(ctx.config, self._format(), unpack=True, pages_of=make)


@dataclass(frozen=True)
class UnrotatedPages(Pages):
    """Pages of keys before their rotation, with what is kept exactly.

    Attributes:
        rotary: ``(like, positions [1, n]) -> cos, sin [1, n, D]``.
        share: of the numbers of a page that are outliers.
        first: how many tokens are sinks.
        exact: of keys and of values the outliers: int16 and numbers ``[B, Hk, pages, n]``; then the keys and the values
            of the sinks ``[B, Hk, s, D]``, rotated.
    """

    rotary: Any = None
    share: float = 0.0
    first: int = 0
    exact: tuple[Tensor, ...] = ()

    @classmethod
    def empty(
        cls,
        keys: Tensor,
        values: Tensor,
        format: KVFormat,
        k_order: Tensor | None,
        *,
        rotary: Any,
        outliers: float,
        sinks: int,
    ) -> UnrotatedPages:
        """As :meth:`vtkernels.kv.pages.Pages.of`."""
        plain = Pages.of(keys, values, format, k_order)
        return cls(format, plain.packed, plain.k_order, None, rotary.to(keys.device), outliers, sinks)

    def append(self, keys: Tensor, values: Tensor) -> UnrotatedPages:
        start, stop = self.tokens, self.tokens + keys.shape[2]
        straight = self._turned(keys.detach(), start, stop, back=True)
        clean, found = [], []
        for x, dim in ((straight, 3), (values.detach(), 4)):
            rest, indices, numbers = self._split(x, dim)
            clean.append(rest)
            found += [indices, numbers.to(values.dtype)]
        if self.exact:
            found = [torch.cat(both, dim=2) for both in zip(self.exact[:4], found, strict=True)]
        sinks = self.exact[4:] or (keys[:, :, : self.first].clone(), values[:, :, : self.first].clone())
        packed: Any = super().append(*clean)
        return replace(packed, exact=(*found, *sinks))

    def unpack(self, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out = []
        for side, x in enumerate(super().unpack(head_dim, torch.float32)):
            indices, numbers = self.exact[2 * side : 2 * side + 2]
            pages = x.unflatten(2, (-1, PAGE_TOKENS)).flatten(3).scatter(3, indices.long(), numbers.float())
            out.append(pages.unflatten(3, (PAGE_TOKENS, -1)).flatten(2, 3))
        out[0] = self._turned(out[0], 0, self.tokens)
        for x, sinks in zip(out, self.exact[4:], strict=True):
            x[:, :, : self.first] = sinks
        return out[0].to(dtype), out[1].to(dtype)

    def map(self, function: Any) -> UnrotatedPages:
        plain = super().map(function)
        return replace(
            self, packed=plain.packed, k_order=plain.k_order, room=None, exact=tuple(map(function, self.exact))
        )

    def _turned(self, keys: Tensor, start: int, stop: int, *, back: bool = False) -> Tensor:
        """Keys at the places start ... stop - 1, float32, rotated or rotated back."""
        cos, sin = self.rotary(keys.float(), torch.arange(start, stop, device=keys.device)[None])
        scale = cos.square() + sin.square() if back else 1.0  # some embeddings scale as well
        low, high = keys.float().chunk(2, dim=-1)
        quarter = torch.cat([-high, low], dim=-1)
        return (keys * cos + quarter * (-sin if back else sin)) / scale

    def _split(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, Hk, N, D]`` with the outliers of its pages replaced by means, their indices in a page, and them.

        ``dim`` is that of the pages ``[B, Hk, pages, 128, D]`` along which statistics run.
        """
        pages = x.float().unflatten(2, (-1, PAGE_TOKENS))
        count = round(self.share * pages[0, 0, 0].numel()) if pages.numel() else 0
        away = (pages - pages.mean(dim, keepdim=True)).abs() / pages.std(dim, keepdim=True).clamp(min=1e-12)
        indices = away.flatten(3).argsort(dim=3, descending=True, stable=True)[..., :count]
        numbers = pages.flatten(3).gather(3, indices)
        inside = torch.ones_like(away.flatten(3)).scatter(3, indices, 0.0).unflatten(3, pages.shape[3:])
        mean = (pages * inside).sum(dim, keepdim=True) / inside.sum(dim, keepdim=True).clamp(min=1)
        rest = torch.where(inside > 0, pages, mean).flatten(2, 3)
        return rest, indices.to(torch.int16), numbers
