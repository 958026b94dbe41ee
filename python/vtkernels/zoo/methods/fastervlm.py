"""FasterVLM: keep the patches that the [CLS] token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtkernels import prune_gather
from vtkernels.zoo.recipe import Context, Encoder, Kept, Recipe


@dataclass(frozen=True)
class FasterVLM(Recipe):
    """Scores a patch by the attention it receives from [CLS], averaged over heads.

    ``s_j = mean_h attn(layer)[h, CLS, j]``, the softmax over all keys including [CLS], not renormalised;
    the ``keep`` largest, in raster order.

    Args:
        layer: encoder layer, 0-based; None = the layer whose output the language model gets (22 in LLaVA-1.5).

    Deviations from the released code: features are gathered before the projector, which treats each token on its own
    (same result, less work); scores are float32 where it keeps them in the image's dtype, in which fp16 scores tie.
    """

    name: ClassVar[str] = "fastervlm"
    title: ClassVar[str] = "[CLS] Attention is All You Need for Training-Free Visual Token Pruning"
    reference: ClassVar[str] = "arXiv:2412.01818"
    status: ClassVar[str] = "verified: read in the authors' code"

    layer: int | None = None

    @property
    def needs_cls(self) -> bool:
        return True

    def attention_layers(self, encoder: Encoder) -> tuple[int, ...]:
        return (encoder.feature_layer if self.layer is None else self.layer,)

    def vision_encoder(self, ctx: Context) -> Kept:
        (layer,) = self.attention_layers(ctx.encoder)
        return prune_gather(ctx.tokens, ctx.attention(layer, voters="cls"), ctx.keep)
