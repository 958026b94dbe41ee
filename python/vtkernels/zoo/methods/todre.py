"""ToDRE, stage 1: a diverse subset grown from the most attended token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtkernels import prune_gather, select_diverse
from vtkernels.zoo.recipe import Context, Encoder, Kept, Recipe


@dataclass(frozen=True)
class ToDRE(Recipe):
    """Greedy diversity on the projected tokens, seeded with the pivot: the token with the highest [CLS] attention.

    With X the L2-normalised tokens: start from the pivot and repeat, ``max_sum``: add ``argmin_c sum over selected s
    of x_c . x_s``; ``max_min`` (k-center): add ``argmax_c min over selected s of (1 - x_c . x_s)``.

    Args:
        mode: ``max_sum`` (the paper's second version) or ``max_min`` (its first version, the textbook k-center).
        layer: encoder layer of the pivot's [CLS] attention, 0-based; None = the last one, as the paper states.
        seed: without a [CLS] token the paper draws the pivot at random; this seeds the draw. It is the same token
            number for every image, so that a result does not depend on its batch.

    Stage 1 only: the second stage, which drops all visual tokens deep in the decoder, is another stage's work.
    Inferred: no official code. The kept order is not stated in the paper; ascending positions are the safe reading.
    Only the visual tokens of one image compete with each other.
    """

    name: ClassVar[str] = "todre"
    title: ClassVar[str] = "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance"
    reference: ClassVar[str] = "arXiv:2505.18757"
    status: ClassVar[str] = "paper text (version 2), no code released; inferred: kept order, max_min variant"

    mode: Literal["max_sum", "max_min"] = "max_sum"
    layer: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.one_of("mode", ("max_sum", "max_min"))

    def attention_layers(self, encoder: Encoder) -> tuple[int, ...]:
        if not encoder.has_cls:
            return ()
        return (encoder.num_layers - 1 if self.layer is None else self.layer,)

    def after_projector(self, ctx: Context) -> Kept:
        return ctx.take(select_diverse(ctx.tokens.detach(), ctx.keep, self._pivot(ctx), mode=self.mode))

    def _pivot(self, ctx: Context) -> Tensor:
        """The first token of each image's subset: int64 [images]."""
        images, n, _ = ctx.tokens.shape
        if not ctx.encoder.has_cls:
            pivot = torch.randint(n, (1,), generator=torch.Generator().manual_seed(self.seed))
            return pivot.to(ctx.tokens.device).repeat(images)
        (layer,) = self.attention_layers(ctx.encoder)
        scores = ctx.attention(layer, voters="cls")
        _, best = prune_gather(scores.unsqueeze(-1), scores, 1)
        return best[:, 0]
