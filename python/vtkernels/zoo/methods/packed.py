"""The whole cache in pages of one format, by no paper's rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vtkernels.kv import KVFormat
from vtkernels.zoo.caching import CacheContext
from vtkernels.zoo.recipe import Recipe


@dataclass(frozen=True)
class Packed(Recipe):
    """:class:`vtkernels.cache.PackedKVCache` as it is.

    Args:
        format: of all layers (``str`` of a :class:`vtkernels.kv.KVFormat`).
        window: at least how many of the latest tokens stay in the model's dtype.
    """

    name: ClassVar[str] = "packed"
    title: ClassVar[str] = "Baseline: every full page of the cache in one format"
    reference: ClassVar[str] = "docs/kv.md"
    status: ClassVar[str] = "ours"

    format: str = "int4/int4/64"
    window: int = 0

    def __post_init__(self) -> None:
        KVFormat.parse(self.format)

    def cache(self, ctx: CacheContext) -> Any:
        from vtkernels.cache import PackedKVCache

        return PackedKVCache(ctx.config, self.format, window=self.window)
