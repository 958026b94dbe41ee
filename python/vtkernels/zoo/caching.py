"""The cache of one generation: what a method knows of the prompts when it makes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class CacheContext:
    """B prompts of T tokens with padding, as the language model is about to see them: earlier stages have pruned.

    Attributes:
        config: of the language model.
        visual: bool ``[B, T]``, the places of the visual tokens.
        real: bool ``[B, T]``, what is not padding.
        tokens: ``[n, C]``, the visual tokens prompt after prompt, in the order of their places.
        questions: as in :class:`vtkernels.zoo.Context`, where the recipe ``reads_question``.
        embed: the language model's embedding table: ids ``[*]`` -> ``[*, C]``.
        survivors: cache, layer -> int64 ``[B', T']``, the places of the tokens that reach the layer, -1 for padding;
            None where all do. Known when the layer runs.
    """

    config: Any
    visual: Tensor
    real: Tensor
    tokens: Tensor
    questions: Sequence[Tensor]
    embed: Callable[[Tensor], Tensor]
    survivors: Callable[[Any, int], Tensor | None]

    def in_layer(self, marks: Tensor, cache: Any, layer: int, keys: Tensor) -> Tensor:
        """Marks of prompt tokens, bool ``[B, T]``, as marks of the tokens that a layer's first call caches.

        Beams repeat prompts, pruning between layers leaves some of their tokens, and speculated tokens, which are
        not marked, may stand behind them.

        Args:
            keys: ``[B', Hk, T', D]``, those of that call.

        Returns:
            bool ``[B', T']``.

        Raises:
            ValueError: a prefill in chunks.
        """
        marks = marks.to(keys.device).repeat_interleave(len(keys) // len(marks), dim=0)
        source = self.survivors(cache, layer)
        if source is not None:
            marks = marks.gather(1, source.clamp(min=0)) & (source >= 0)
        if marks.shape[1] > keys.shape[2]:
            raise ValueError(
                f"vtkernels.zoo: expected a prompt's {marks.shape[1]} tokens in one call, got {keys.shape[2]}; methods "
                "of the cache do not take a prefill in chunks"
            )
        return pad(marks, (0, keys.shape[2] - marks.shape[1]))


def store_rows(layer: Any, rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Lets a layer of a :class:`vtkernels.cache.PackedKVCache` keep these tokens alone, prompts of any length.

    Args:
        rows: of each batch item its keys and values ``[Hk, K, D]`` and their places int64 ``[K]``, as
            :meth:`vtkernels.cache.PackedKVLayer.evict` takes them.
    """
    longest = max(len(places) for _, _, places in rows)
    keys, values = (
        torch.stack([pad(row[side], (0, 0, longest - row[side].shape[1], 0)) for row in rows]) for side in (0, 1)
    )
    layer.evict(keys, values, torch.stack([pad(places, (longest - len(places), 0), value=-1) for _, _, places in rows]))


def note_states(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before a decoder layer: what enters it, ``[B, T, C]``, for the cache of the call."""
    cache: Any = kwargs.get("past_key_values")
    if hasattr(cache, "states"):
        cache.states = args[0].detach()
