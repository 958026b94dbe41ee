"""HiPrune: object patches from a middle layer, their neighbours, and the rest from a deep layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtkernels import prune_gather
from vtkernels.zoo.recipe import Context, Encoder, Kept, Recipe


@dataclass(frozen=True)
class HiPrune(Recipe):
    """Anchors, buffers and registers, by the attention that a patch receives from all query rows.

    ``a(l)_j = mean over heads and all query rows ([CLS] too) of attn(l)[:, :, j]``, the [CLS] column left out.
    Anchors: the ``round(keep * alpha / 5)`` best of ``a(object_layer - 1)`` (Python's round, ties to even).
    Buffers: the up to four grid neighbours of each anchor.
    Registers: the best of the deep map ``a(feature layer)`` among the others, up to ``keep`` in all. Raster order.

    Args:
        alpha: share of the budget for anchors and buffers.
        object_layer: 1-based middle layer; None = 9 of 24, and the same relative depth in other towers.
        released_wrap: take neighbours as the released code does: j-1, j+1, j-w, j+w clamped to the image. There, a
            left or right neighbour may land on the adjacent grid row and a clamped one on a corner. Off by default:
            a defect, kept only to reproduce published numbers.

    Every anchor may bring four neighbours, so ``5 * anchors <= keep`` is required.
    Deviations from the released code: chosen patches are excluded by a mask instead of subtracting 1 (same result);
    gather before the projector (same result); float32 scores.
    """

    name: ClassVar[str] = "hiprune"
    title: ClassVar[str] = "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention"
    reference: ClassVar[str] = "arXiv:2508.00553"
    status: ClassVar[str] = "verified: read in the authors' code"

    alpha: float = 0.1
    object_layer: int | None = None
    released_wrap: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"hiprune: expected alpha in [0, 1], got {self.alpha}")

    def attention_layers(self, encoder: Encoder) -> tuple[int, ...]:
        object_layer = max(1, encoder.scaled(9)) if self.object_layer is None else self.object_layer
        return (object_layer - 1, encoder.feature_layer)

    def check(self, encoder: Encoder, keep: int) -> None:
        anchors = self._num_anchors(keep)
        if 5 * anchors > keep:
            raise ValueError(
                f"hiprune: alpha={self.alpha} asks for {anchors} anchors with up to {5 * anchors} tokens, "
                f"more than keep={keep}; lower alpha or raise keep"
            )

    def vision_encoder(self, ctx: Context) -> Kept:
        middle, deep = (ctx.attention(layer, voters="all") for layer in self.attention_layers(ctx.encoder))
        chosen = torch.zeros_like(deep, dtype=torch.bool)
        if (num_anchors := self._num_anchors(ctx.keep)) > 0:
            _, anchors = prune_gather(ctx.tokens, middle, num_anchors)
            chosen.scatter_(1, anchors, True)
            chosen.scatter_(1, _neighbours(anchors, ctx.encoder.grid, self.released_wrap), True)
        # Kept tokens count toward keep, so the deep map fills what anchors and buffers leave.
        return prune_gather(ctx.tokens, deep, ctx.keep, keep_mask=chosen)

    def _num_anchors(self, keep: int) -> int:
        return round(keep * self.alpha / 5)


def _neighbours(anchors: Tensor, grid: tuple[int, int], released_wrap: bool) -> Tensor:
    """Left, right, upper and lower neighbour of each anchor [B, A] -> [B, 4A]; outside the grid, the anchor itself."""
    height, width = grid
    last = height * width - 1
    shifted = torch.stack([anchors - 1, anchors + 1, anchors - width, anchors + width])
    if released_wrap:
        return torch.cat(list(shifted.clamp(0, last)), dim=1)
    column = anchors % width
    inside = torch.stack([column > 0, column < width - 1, anchors >= width, anchors + width <= last])
    return torch.cat(list(torch.where(inside, shifted, anchors)), dim=1)
