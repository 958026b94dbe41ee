"""TinyChart: ToMe with a constant number of tokens a layer, trained with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtkernels.zoo.methods.tome import ToMe


@dataclass(frozen=True)
class TinyChart(ToMe):
    """ToMe in every layer of a SigLIP tower, r constant, no protected token; the language model gets plain tokens.

    Metric, split, weighted mean and proportional attention are ToMe's. ``keep`` spreads the merging evenly over the
    layers up to the one whose output is used: at 768 pixels, 2916 patches and 26 layers, ``keep=732`` is the paper's
    ``r=84``. A [CLS] token is protected where there is one, which the paper's tower does not have.

    Args:
        r: tokens merged in every layer instead of ``keep``; the paper's is 84 at 2916 patches.
        proportional_attention: as in ToMe.
        order: ``"position"`` orders the output tokens by their first patch; the released model is trained with
            ``"method"``, unmerged tokens by descending similarity, then all of odd position.

    The method is trained with merging in the graph; gradients flow through the merged tokens. Without that training
    this is its rule alone.
    """

    name: ClassVar[str] = "tinychart"
    title: ClassVar[str] = "TinyChart: Efficient Chart Understanding with Visual Token Merging"
    reference: ClassVar[str] = "arXiv:2404.16635"
    status: ClassVar[str] = "verified: read in the authors' code"
    training_free: ClassVar[bool] = False

    r: int | None = None
