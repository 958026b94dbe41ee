"""AuroraCap: ToMe with a constant number of tokens a layer, given by the share of tokens to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtkernels.zoo.merging import LayerContext, LayerMerge, LayerMerging, clamped
from vtkernels.zoo.methods.tome import merge_even_odd
from vtkernels.zoo.recipe import Encoder


@dataclass(frozen=True)
class AuroraCap(LayerMerging):
    """ToMe in every layer, [CLS] protected, the same r in each.

    Metric, split, weighted mean and proportional attention are ToMe's. ``keep`` spreads the merging evenly over the
    layers up to the one whose output is used and is met exactly.

    Args:
        ratio: the paper's own parameter instead of ``keep``, in (0, 1]: ``r = int(n * (1 - ratio) / L)`` with n patches
            and the encoder's L layers. What is left is more than the ratio says, because r is truncated and the layers
            after the one whose output is used merge nothing: 306 of 729 patches at 0.4 with 48 layers. Published
            settings: 0.4 in evaluation, 0.1 in training; the authors advise 0.2 to 0.4 for captions, above 0.5 for
            questions, above 0.8 for text in images.
        proportional_attention: as in ToMe.
        order: ``"position"`` orders the output tokens by their first patch, ``"method"`` as ToMe's code leaves them.

    The model is trained with merging, and ratios may differ between training and use. Its slow-fast option for videos,
    the first frame with all its tokens, is not served: all images of a call share one schedule.
    """

    name: ClassVar[str] = "auroracap"
    title: ClassVar[str] = "AuroraCap: Efficient, Performant Video Detailed Captioning and a New Benchmark"
    reference: ClassVar[str] = "arXiv:2410.03051"
    status: ClassVar[str] = "verified: read in the authors' code"
    training_free: ClassVar[bool] = False

    ratio: float | None = None
    proportional_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"auroracap: expected ratio in (0, 1], got {self.ratio}")

    @property
    def weighs_keys(self) -> bool:
        return self.proportional_attention

    def own_schedule(self, encoder: Encoder) -> list[int] | None:
        if self.ratio is None:
            return None
        r = int(encoder.num_patches * (1 - self.ratio) / encoder.num_layers)
        return clamped([r] * (encoder.feature_layer + 1), encoder.num_patches)

    def vision_layers(self, ctx: LayerContext) -> LayerMerge:
        return merge_even_odd(ctx)
