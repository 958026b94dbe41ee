"""Vision encoder layers that run on some tokens of a frame and reuse a reference frame's results for the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtkernels.zoo.recipe import Recipe


@dataclass(frozen=True)
class ReuseContext:
    """One layer, on the frames that are no references.

    Attributes:
        keys: [frames, n, C], the layer's keys of their patches, heads side by side, constants of the backward pass.
        cached: [frames, n, C], those of each one's reference frame.
        layer: which layer this is, of ``num_layers``.
        refresh: patches of a frame to compute anew.
    """

    keys: Tensor
    cached: Tensor
    layer: int
    num_layers: int
    refresh: int


@dataclass(frozen=True)
class LayerReuse(Recipe):
    """Base of the methods that compute some of a frame's tokens: a subclass defines :meth:`vision_layers`.

    All tokens stay. The budget, ``keep`` elsewhere, is how many patches of a frame each layer computes anew; all of
    them is the untouched encoder. A reference frame is computed whole. Every layer of another frame projects all of its
    keys; queries, values, attention and MLP it computes for the chosen patches and for [CLS], and takes those of the
    reference frame for the others. Residuals are the frame's own.
    """

    def references(self, frames: int) -> list[int]:
        """The reference of each frame of a video, at most its own number; a frame that is its own is computed whole."""
        raise NotImplementedError

    def vision_layers(self, ctx: ReuseContext) -> Tensor:
        """The patches to compute anew: int64 [frames, refresh], ascending."""
        raise NotImplementedError
