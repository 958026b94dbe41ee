"""VisionDrop, the encoder's stage: what [CLS] attends to stays, the rest is added to evenly spaced targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtkernels import merge_apply, nearest_match, prune_gather
from vtkernels.zoo.recipe import Context, Encoder, Merged, Recipe


@dataclass(frozen=True)
class VisionDrop(Recipe):
    """``keep = dominant + contextual`` tokens of each image, the contextual ones last.

    Dominant: the patches with the largest ``sum_h attn(layer)[h, CLS, j]``, in raster order. Of the R others the
    numbers 0, step, 2 step, ... with ``step = max(1, R // contextual)`` are targets; every other one goes to the target
    with the most similar key (cosine, keys averaged over heads). ``contextual = target + mean of its tokens``: the sum
    of both, a target alone is unchanged.

    Args:
        contextual: share of the budget for contextual tokens, rounded (Python's round, ties to even). Released: 6 of
            48.
        layer: encoder layer, 0-based; None = the layer whose output the language model gets (22 in LLaVA-1.5).

    This stage alone: the same is done again inside the language model after 8, 16 and 24 layers, which is another
    stage's work. Deviation: the released code keeps [CLS] as one of the dominant tokens; the features that LLaVA hands
    to its projector do not have it, so a patch takes its place.
    """

    name: ClassVar[str] = "visiondrop"
    title: ClassVar[str] = "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment"
    reference: ClassVar[str] = "arXiv:2506.22283"
    status: ClassVar[str] = "verified: read in the authors' code"
    merges: ClassVar[bool] = True

    contextual: float = 0.125
    layer: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.contextual <= 1:
            raise ValueError(f"visiondrop: expected contextual in [0, 1], got {self.contextual}")

    @property
    def needs_cls(self) -> bool:
        return True

    def attention_layers(self, encoder: Encoder) -> tuple[int, ...]:
        return (encoder.feature_layer if self.layer is None else self.layer,)

    def vision_encoder(self, ctx: Context) -> Merged:
        (layer,) = self.attention_layers(ctx.encoder)
        n, contextual = ctx.tokens.shape[1], round(ctx.keep * self.contextual)
        dominant = ctx.keep - contextual
        scores = ctx.attention(layer, voters="cls", head_reduce="sum")
        kept, indices = prune_gather(ctx.tokens, scores, dominant)
        is_dominant = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, True)
        row = is_dominant.cumsum(1) - 1
        if contextual == 0:
            return Merged.even(kept, row.where(is_dominant, -1))
        others = is_dominant.byte().argsort(dim=1, stable=True)[:, : n - dominant]
        centers = others[:, :: max(1, (n - dominant) // contextual)][:, :contextual]

        keys = ctx.projections[layer][1][:, :, 1:].mean(1)
        owner, _ = nearest_match(keys, centers, valid=~is_dominant)
        merged, _ = merge_apply(ctx.tokens, owner, contextual, reduce="target_plus_mean", center=centers)
        return Merged.even(torch.cat([kept, merged], dim=1), row.where(is_dominant, owner + dominant))
