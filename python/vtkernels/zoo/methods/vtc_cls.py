"""VTC-CLS: [CLS] attention summed over the later encoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtkernels import prune_gather
from vtkernels.zoo.recipe import Context, Encoder, Kept, Recipe


@dataclass(frozen=True)
class VtcCls(Recipe):
    """Scores a patch by the [CLS] attention it receives, summed over the layers from ``start_layer`` on.

    ``s_j = sum over l in [start_layer, L-2] of mean_h attn(l)[h, CLS, j]``; the ``keep`` largest, in raster order.
    The last of the L layers is left out, as in the released code.

    Args:
        start_layer: first layer of the sum, 0-based; None = 16 of 24, and the same relative depth in other towers
            (never later than L-2). 16 is the released command line's default; the paper's choice per budget is not
            published.

    Deviations from the released code: features are gathered before the projector (same result); any batch size;
    float32 scores.
    """

    name: ClassVar[str] = "vtc_cls"
    title: ClassVar[str] = "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs"
    reference: ClassVar[str] = "arXiv:2412.05819"
    status: ClassVar[str] = "verified: read in the authors' code; the start layer per budget is not published"

    start_layer: int | None = None

    @property
    def needs_cls(self) -> bool:
        return True

    def attention_layers(self, encoder: Encoder) -> tuple[int, ...]:
        last = encoder.num_layers - 2
        start = min(encoder.scaled(16), last) if self.start_layer is None else self.start_layer
        return tuple(range(start, last + 1))

    def check(self, encoder: Encoder, keep: int) -> None:
        if not self.attention_layers(encoder):
            raise ValueError(
                f"vtc_cls: expected start_layer <= {encoder.num_layers - 2} (the last of the {encoder.num_layers} "
                f"encoder layers is left out), got {self.start_layer}"
            )

    def vision_encoder(self, ctx: Context) -> Kept:
        layers = self.attention_layers(ctx.encoder)
        scores = torch.stack([ctx.attention(layer, voters="cls") for layer in layers]).sum(0)
        return prune_gather(ctx.tokens, scores, ctx.keep)
