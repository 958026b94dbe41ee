"""Merging inside the vision encoder: what a method sees of one layer, what it returns, and how a budget becomes a
number of tokens a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtkernels.zoo.recipe import BudgetError, Encoder, Recipe


@dataclass(frozen=True)
class LayerContext:
    """One layer of a vision transformer, where its tokens merge.

    Attributes:
        tokens: [images, n, C], between attention and MLP, or after the MLP for a recipe that merges there.
        keys: [images, H, n, D], the layer's keys as projected, without norm or rotation.
        size: float32 [images, n], how many tokens each one stands for; None for ones.
        prefix: tokens at the front that neither merge nor move: [CLS], distillation, registers.
        layer: which layer this is, of ``num_layers`` that the encoder has.
        r: tokens to merge away, at most half of those that may.
    """

    tokens: Tensor
    keys: Tensor
    size: Tensor | None
    prefix: int
    layer: int
    num_layers: int
    r: int

    @property
    def metric(self) -> Tensor:
        """[images, n, D]: the mean of the keys over heads."""
        return self.keys.mean(1)

    @property
    def protect(self) -> Tensor | None:
        """bool [images, n]: the prefix; None without one."""
        if self.prefix == 0:
            return None
        images, n, _ = self.tokens.shape
        return (torch.arange(n, device=self.tokens.device) < self.prefix).repeat(images, 1)


@dataclass(frozen=True)
class LayerMerge:
    """What a layer's merging returns.

    Attributes:
        tokens: [images, n - r, C], the prefix first.
        owner: int64 [images, n], the row of ``tokens`` that each token went into.
        size: float32 [images, n - r]; None for a method that does not track sizes.
    """

    tokens: Tensor
    owner: Tensor
    size: Tensor | None = None

    def permuted(self, order: Tensor) -> LayerMerge:
        """The same with its rows in the given order, int64 [images, n - r]."""
        return LayerMerge(
            tokens=self.tokens.gather(1, order.unsqueeze(-1).expand_as(self.tokens)),
            owner=order.argsort(1).gather(1, self.owner),
            size=None if self.size is None else self.size.gather(1, order),
        )


@dataclass(frozen=True)
class LayerMerging(Recipe):
    """Base of the methods that merge inside the encoder's layers: a subclass defines :meth:`vision_layers`.

    Tokens merge in every layer up to the one whose output is used. Sizes (where tracked) and owners are carried from
    layer to layer for the method. With ``order="position"`` the output tokens come in the order of the first patch of
    each, with ``"method"`` in the method's own; inside the encoder the order is always the method's own.
    """

    merges: ClassVar[bool] = True

    order: str = "position"

    def __post_init__(self) -> None:
        self.one_of("order", ("position", "method"))

    @property
    def weighs_keys(self) -> bool:
        """Whether attention is proportional to the sizes."""
        return False

    @property
    def after_mlp(self) -> bool:
        """Whether tokens merge after a layer's MLP instead of before it."""
        return False

    def own_schedule(self, encoder: Encoder) -> list[int] | None:
        """Tokens merged away in each layer by the method's own parameter; None when it is not given."""
        raise NotImplementedError

    def schedule_for(self, encoder: Encoder, keep: int) -> list[int]:
        """Tokens merged away in each layer up to the feature layer, so that ``keep`` are left."""
        return spread(encoder.num_patches, keep, encoder.feature_layer + 1)

    def vision_layers(self, ctx: LayerContext) -> LayerMerge:
        raise NotImplementedError

    def schedule(self, encoder: Encoder, keep: int) -> list[int]:
        own = self.own_schedule(encoder)
        return self.schedule_for(encoder, keep) if own is None else own

    def budget(self, encoder: Encoder, keep: int | None) -> int | None:
        own = self.own_schedule(encoder)
        if own is None:
            return keep
        left = encoder.num_patches - sum(own)
        if keep not in (None, left):
            raise ValueError(f"{self.name}: the options leave {left} tokens an image, got keep={keep}; give either")
        return left

    def check(self, encoder: Encoder, keep: int) -> None:
        layers = encoder.feature_layer + 1
        least = -(-encoder.num_patches // 2**layers)
        if keep < least:
            raise BudgetError(
                f"{self.name}: expected keep >= {least}, what {layers} layers leave of {encoder.num_patches} tokens "
                f"when each merges half of them, got {keep}"
            )


def clamped(wanted: Sequence[int], tokens: int) -> list[int]:
    """At most half of the ``tokens`` that each layer still has."""
    schedule = []
    for r in wanted:
        schedule.append(min(r, tokens // 2))
        tokens -= schedule[-1]
    return schedule


def spread(tokens: int, keep: int, layers: int) -> list[int]:
    """The same number in every layer, early ones one more where it does not divide; where half of the tokens is less
    than that in late layers, early ones make up for it.
    """
    schedule = []
    for left in range(layers, 0, -1):
        even = -(-(tokens - keep) // left)
        schedule.append(max(even, tokens - keep * 2 ** (left - 1)))
        tokens -= schedule[-1]
    return schedule


def geometric(tokens: int, keep: int, layers: int) -> list[int]:
    """The same share in every layer: ``tokens * (keep / tokens)^((l + 1) / layers)`` are left after layer l."""
    schedule, left = [], tokens
    for layer in range(layers):
        wanted = round(tokens * (keep / tokens) ** ((layer + 1) / layers))
        schedule.append(min(left - wanted, left // 2))
        left -= schedule[-1]
    return schedule
