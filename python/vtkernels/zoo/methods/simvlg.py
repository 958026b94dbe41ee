"""SimVLG: a constant number of tokens a layer, merged by the plain mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtkernels.zoo.merging import LayerContext, LayerMerge, LayerMerging, clamped
from vtkernels.zoo.methods.tome import merge_even_odd
from vtkernels.zoo.recipe import Encoder


@dataclass(frozen=True)
class SimVLG(LayerMerging):
    """ToMe's matching with a constant r, the plain mean of the tokens as they are, no sizes, no proportional attention.

    This is the method's merging rule alone, inside the vision tower. The method itself merges inside its connector, a
    trained BERT-shaped module of 12 layers between the tower and the language model, which LLaVA does not have: there,
    257 tokens lose 19 in each layer after the self-attention, [CLS] protected, and 29 are left. Its temporal attention
    for videos, trained too, is not served either.

    Args:
        r: tokens merged in every layer instead of ``keep``, which spreads them evenly; 19 in the paper's connector.
        order: ``"position"`` orders the output tokens by their first patch, ``"method"`` as ToMe's code leaves them.
    """

    name: ClassVar[str] = "simvlg"
    title: ClassVar[str] = "SimVLG: Simple and Efficient Pretraining of Visual Language Generative Models"
    reference: ClassVar[str] = "arXiv:2310.03291"
    status: ClassVar[str] = "verified: read in the authors' code; the merging rule alone, see the docstring"
    training_free: ClassVar[bool] = False

    r: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and self.r < 0:
            raise ValueError(f"simvlg: expected r >= 0, got {self.r}")

    def own_schedule(self, encoder: Encoder) -> list[int] | None:
        return None if self.r is None else clamped([self.r] * (encoder.feature_layer + 1), encoder.num_patches)

    def vision_layers(self, ctx: LayerContext) -> LayerMerge:
        return merge_even_odd(ctx, weighted=False)
