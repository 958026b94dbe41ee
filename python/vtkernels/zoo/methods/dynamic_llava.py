"""Dynamic-LLaVA's conditional append: while answering, deep layers store only the tokens that are worth it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from vtkernels.kv import KVFormat
from vtkernels.zoo.caching import CacheContext
from vtkernels.zoo.recipe import Recipe


class TextPredictor(nn.Sequential):
    """The method's predictor for text: hidden states ``[*, width]`` -> two logits, of storing a token and of not."""

    def __init__(self, width: int):
        sizes = (width, 512, 256, 128)
        hidden = [part for sides in itertools.pairwise(sizes) for part in (nn.Linear(*sides), nn.GELU())]
        super().__init__(nn.LayerNorm(width), *hidden, nn.Linear(128, 2))


@dataclass(frozen=True)
class DynamicLLaVA(Recipe):
    """From layer ``layer`` on, keys and values of a token that the model has generated are stored if ``logits[0] >
    logits[1]`` for its hidden state as it enters that layer; one decision for all of these layers. A token that is not
    stored still attends to itself in its own step. Prompts, later turns too, are stored whole; positions count every
    token.

    Args:
        predictor: hidden states ``[B, C]`` -> logits ``[B, 2]``, a trained :class:`TextPredictor`; None: without
            training, a token is stored unless the cosine of its values in the layer (all heads as one vector) with
            those of a token behind the prompt that is stored in no page there reaches ``threshold``: what repeats goes.
        layer: None: 2 as published, or the last one of a model with fewer than three.
        threshold: of the rule without a predictor.
        format: how the pages of all layers are packed; ``none``: not.

    In a batch every prompt has its own decisions; memory is that of the prompt which stores most. Deviations: the
    predictor for images, which prunes the prompt at the same layer, is none of the cache's and not here. The weights of
    the predictors are the authors'; the rule without one is ours.
    """

    name: ClassVar[str] = "dynamic_llava"
    title: ClassVar[str] = "Dynamic-LLaVA: Efficient MLLMs via Dynamic Vision-language Context Sparsification"
    reference: ClassVar[str] = "arXiv:2412.00876"
    status: ClassVar[str] = "verified: what is stored, where and by which predictor; the rule without one is ours"
    training_free: ClassVar[bool] = False

    predictor: Callable[[Tensor], Tensor] | None = None
    layer: int | None = None
    threshold: float = 0.9
    format: str = "none/none/64"

    def __post_init__(self) -> None:
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"dynamic_llava: expected layer >= 0, got {self.layer}")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"dynamic_llava: expected threshold in [-1, 1], got {self.threshold}")
        KVFormat.parse(self.format)

    def watched_layer(self, num_layers: int) -> int:
        layer = min(2, num_layers - 1) if self.layer is None else self.layer
        if layer >= num_layers:
            raise ValueError(f"dynamic_llava: expected a layer below {num_layers}, got {layer}")
        return layer

    def cache(self, ctx: CacheContext) -> Any:
        from vtkernels.cache import PackedKVCache

        first = self.watched_layer(ctx.config.num_hidden_layers)
        prompt: list[int] = []  # its tokens in the first of these layers
        decided: list[Tensor] = []

        def stores(cache: Any, index: int, values: Tensor) -> Tensor | None:
            if cache.is_recording_past(index):
                raise NotImplementedError("dynamic_llava: expected no speculation, which takes back forgotten tokens")
            if index < first:
                return None
            if index == first:
                prompt[:] = prompt or [cache.get_seq_length(index)]
                decided[:] = [self._decide(cache, index, values, prompt[0])]
            return decided[0]

        return PackedKVCache(ctx.config, self.format, stores=stores)

    @torch.no_grad()
    def _decide(self, cache: Any, index: int, values: Tensor, prompt: int) -> Tensor:
        if self.predictor is not None:
            logits = self.predictor(cache.states[:, -1])
            return logits[:, 0] > logits[:, 1]
        stored = cache.layers[index].stored
        generated = stored.residual_places() >= prompt
        others = stored.values.transpose(1, 2).flatten(2)
        alike = cosine_similarity(others.float(), values.flatten(1)[:, None].float(), dim=-1)
        return ~((alike >= self.threshold) & generated).any(1)
