"""Video-XL-2's cache of two levels: chunks of a video that matter as they are, the others pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtkernels import attention_scores, merge_apply
from vtkernels.kv import KVFormat
from vtkernels.zoo.caching import CacheContext, store_rows
from vtkernels.zoo.recipe import Recipe

_Unit = range  # places of one run of visual tokens in its prompt


@dataclass(frozen=True)
class VideoXL2(Recipe):
    """Once, after the prefill, in every layer: a unit is a run of visual tokens (a frame, or the frames that a model
    makes one of), ``chunk`` units are a chunk. Text stays, timestamps between units too; the first and the last chunk
    stay; so do the relevant ones of the others. Of each unit of the rest every ``pool`` tokens in a row become one: the
    mean of their keys, rotary embedding applied, and of their values.

    Relevance of a chunk: the attention that its visual tokens get from the tokens behind the last visual one, mean over
    heads, over those rows and over its tokens. Ties: the earlier chunk.

    Args:
        chunk: units of a chunk; None: 4 as published, fewer in a video of fewer than 32 units, so that it has 8 chunks.
        pool: tokens that become one; the last ones of a unit may be fewer.
        relevant: share of the chunks that are neither first nor last, rounded.
        format: how the pages are packed; ``none``: not.

    Deviations: the released code reads the relevant units from files whose making it does not have: relevance by
    attention, layer by layer, is ours. It computes the question anew beside the cache of two levels, at positions that
    follow it; here the question keeps the keys and values that it got beside all tokens, at its own positions. The
    prefill in chunks that see their neighbours is no part of the cache: attention here sees everything before it.
    """

    name: ClassVar[str] = "video_xl2"
    title: ClassVar[str] = "Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware KV Sparsification"
    reference: ClassVar[str] = "arXiv:2506.19225"
    status: ClassVar[str] = "verified: pooling and which chunks stay; inferred: relevance, share, shorter chunks"
    video: ClassVar[bool] = True

    chunk: int | None = None
    pool: int = 12
    relevant: float = 0.25
    format: str = "none/none/64"

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"video_xl2: expected chunk >= 1, got {self.chunk}")
        if self.pool < 2:
            raise ValueError(f"video_xl2: expected pool >= 2, got {self.pool}")
        if not 0 <= self.relevant <= 1:
            raise ValueError(f"video_xl2: expected relevant in [0, 1], got {self.relevant}")
        KVFormat.parse(self.format)

    def cache(self, ctx: CacheContext) -> Any:
        from vtkernels.cache import PackedKVCache

        def shrink(cache: Any, index: int, attended: Any) -> None:
            visual, real = (ctx.in_layer(marks, cache, index, attended.key) for marks in (ctx.visual, ctx.real))
            if cache.is_recording_past(index):
                raise NotImplementedError("video_xl2: expected no speculation, which takes back merged tokens")
            self._shrink(cache.layers[index], attended, visual, real)

        return PackedKVCache(ctx.config, self.format, after_prompt=shrink)

    def _shrink(self, layer: Any, attended: Any, visual: Tensor, real: Tensor) -> None:
        rows = []
        for row, is_real in enumerate(real):
            (prompt,) = is_real.nonzero(as_tuple=True)
            units = runs(visual[row, prompt])
            pooled = self._pooled(units, row, prompt, attended)
            owner = self.owner(len(prompt), pooled).to(prompt.device)
            last = (owner.diff(append=owner.new_tensor([-1])) != 0).nonzero()[:, 0]
            key, value = (x[row, :, prompt] for x in (layer.keys, layer.values))
            if pooled:
                shared = owner.expand(len(key), -1)
                key, value = (merge_apply(x, shared, len(last), reduce="mean")[0] for x in (key, value))
            rows.append((key, value, prompt[last]))
        if any(len(places) < int(is_real.sum()) for (_, _, places), is_real in zip(rows, real, strict=True)):
            store_rows(layer, rows)

    def _pooled(self, units: Sequence[_Unit], row: int, prompt: Tensor, attended: Any) -> list[_Unit]:
        """The units that become shorter."""
        size = self.chunk or max(1, min(4, len(units) // 8))
        chunks = [units[start : start + size] for start in range(0, len(units), size)]
        others = chunks[1:-1]
        if not others:
            return []
        rows = max(1, len(prompt) - units[-1].stop)
        lse = None if attended.lse is None else attended.lse[row : row + 1, :, prompt[-rows:]]
        (scores,) = attention_scores(
            attended.query[row : row + 1, :, prompt[-rows:]],
            attended.key[row : row + 1, :, prompt],
            scale=attended.scale,
            lse=lse,
            causal=True,
        ).double()
        means = torch.stack([torch.cat([scores[unit.start : unit.stop] for unit in chunk]).mean() for chunk in others])
        ranked = means.argsort(descending=True, stable=True).tolist()
        stays = set(ranked[: round(self.relevant * len(others))])
        return [unit for number, chunk in enumerate(others) if number not in stays for unit in chunk]

    def owner(self, length: int, pooled: Sequence[_Unit]) -> Tensor:
        """int64 [length], ascending: the entry of the cache that each token of a prompt goes into."""
        first = torch.ones(length, dtype=torch.bool)
        for unit in pooled:
            first[unit.start : unit.stop] = torch.arange(len(unit)) % self.pool == 0
        return first.cumsum(0) - 1


def runs(marks: Tensor) -> list[_Unit]:
    """The runs of True in bool [n]."""
    edges = marks.int().diff(prepend=marks.new_zeros(1).int(), append=marks.new_zeros(1).int())
    starts, ends = ((edges == step).nonzero()[:, 0].tolist() for step in (1, -1))
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]
