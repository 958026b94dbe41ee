"""VidKV: keys of 1.5 bits, values of 1.58, and two bits for the values of the tokens that the question is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtkernels.kv import KVFormat
from vtkernels.zoo.caching import CacheContext
from vtkernels.zoo.recipe import Recipe

_STEP = 32  # the protected tokens' number is a multiple


@dataclass(frozen=True)
class VidKV(Recipe):
    """Groups run along the tokens of a channel. Keys: of the half of the channels with the largest range two bits with
    scale and zero, of the others the sign behind a transform (the scheme ``mix``). Values: ternary, ``x = s {-1, 0,
    1}``, 0 where ``|x| <= mean|x| / 2``.

    Semantic token protection: of a prompt's n visual tokens v the ``max(32, 32 round(protect n / 32))`` with the
    largest mean of ``v . t`` over the embeddings t of its question have values of two bits with scale and zero.

    Args:
        group: 32 as published, 64 or 128: 2.25 or 1.6875 bits an element of the keys, metadata included.
        values: ``ternary5`` (five in a byte: 1.6 bits and metadata) or ``ternary`` (two planes, faster).
        protect: share of the visual tokens; 0: none.
        window: at least how many of the latest tokens stay in the model's dtype; published: what fills no group.

    The formulas are those that the text means. Deviations from the released code: sign codes read back as ``-s`` and
    ``s``, not 0 and s; ternary codes with their scale, which is the mean of ``|x|`` where the code is not 0; a real
    orthonormal transform in place of a complex one that stores two numbers a channel; nothing is packed again;
    channels are chosen for each prompt and head; positions of visual tokens are the prompt's own, not those of one
    model's template. Pages hold 128 tokens: protected tokens that fill none stay in the model's dtype.
    """

    name: ClassVar[str] = "vidkv"
    title: ClassVar[str] = "Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models"
    reference: ClassVar[str] = "arXiv:2503.16257"
    status: ClassVar[str] = "verified: read in the authors' code; formulas as intended"

    group: int = 32
    values: str = "ternary5"
    protect: float = 0.2
    window: int = 0

    def __post_init__(self) -> None:
        self.one_of("values", ("ternary5", "ternary"))
        if not 0 <= self.protect <= 1:
            raise ValueError(f"vidkv: expected protect in [0, 1], got {self.protect}")
        if self.window < 0:
            raise ValueError(f"vidkv: expected window >= 0, got {self.window}")
        self._format(self.values)

    @property
    def reads_question(self) -> bool:
        return self.protect > 0

    def _format(self, values: str) -> KVFormat:
        return KVFormat("mix", values, self.group)

    def cache(self, ctx: CacheContext) -> Any:
        from vtkernels.cache import PackedKVCache

        ordinary = self._format(self.values)
        if self.protect == 0 or not ctx.visual.any():
            return PackedKVCache(ctx.config, ordinary, window=self.window)
        marks = self.protected(ctx)

        def mark(cache: Any, index: int, attended: Any) -> None:
            cache.layers[index].protect(ctx.in_layer(marks, cache, index, attended.key))

        return PackedKVCache(
            ctx.config, ordinary, protected=self._format("int2"), window=self.window, after_prompt=mark
        )

    def protected(self, ctx: CacheContext) -> Tensor:
        """bool [B, T], the tokens whose values get two bits; none of a prompt without words."""
        marks = torch.zeros_like(ctx.visual)
        counts = ctx.visual.sum(1).tolist()
        for row, (tokens, question) in enumerate(zip(ctx.tokens.split(counts), ctx.questions, strict=True)):
            if len(question) == 0:
                continue
            scores = tokens.float() @ ctx.embed(question).float().mean(0)
            count = max(_STEP, _STEP * round(self.protect * len(tokens) / _STEP))
            best = scores.argsort(descending=True, stable=True)[:count]
            (places,) = ctx.visual[row].nonzero(as_tuple=True)
            marks[row, places[best]] = True
        return marks
