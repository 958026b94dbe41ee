"""ToMe: in every layer of the encoder, the most similar tokens merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtkernels import bipartite_merge
from vtkernels.zoo.merging import LayerContext, LayerMerge, LayerMerging, clamped
from vtkernels.zoo.recipe import Encoder


@dataclass(frozen=True)
class ToMe(LayerMerging):
    """Merges r tokens a layer, between attention and MLP, into their most similar ones.

    The metric is the mean of the layer's keys over heads. Tokens of even position are sources, those of odd position
    destinations; each source has an edge to its most similar destination (cosine), the r best edges merge, and a merged
    token is the mean weighted by size. [CLS], distillation and register tokens are protected. A layer merges at most
    half of its other tokens. Attention over merged tokens is proportional: ``log(size)`` is added to the logits of each
    key.

    ``keep`` spreads the merging evenly over the layers up to the one whose output is used.

    Args:
        r: the paper's own parameter instead of ``keep``: tokens merged in every layer; a tuple ``(r, inflect)``, which
            runs from ``int(r * (1 - inflect))`` in the first layer linearly to the mirrored number in the last one,
            each truncated: ``(8, -1)`` decreases from 16 to 0; or a list, one number a layer, zeros after its end.
            Layers are those of the encoder; the ones after the layer whose output is used count and merge nothing.
        proportional_attention: as above; the released code turns it off for MAE models as they are published.
        order: of the output tokens, by their first patch, or the ``"method"``'s own: unmerged tokens of even position,
            then all of odd position, which splits the next layer's tokens in any case.

    Deviations from the released code: ties go to the lower index, and similarities are float32 in every dtype; register
    tokens, which it does not know, are protected.
    """

    name: ClassVar[str] = "tome"
    title: ClassVar[str] = "Token Merging: Your ViT But Faster"
    reference: ClassVar[str] = "arXiv:2210.09461"
    status: ClassVar[str] = "verified: read in the authors' code"

    r: int | tuple[int, float] | list[int] | None = None
    proportional_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.r, tuple) and (len(self.r) != 2 or not -1 <= self.r[1] <= 1):
            raise ValueError(f"{self.name}: expected r as (r, inflect) with inflect in [-1, 1], got {self.r}")
        counts = self.r if isinstance(self.r, list) else [] if self.r is None else [first(self.r)]
        if any(isinstance(r, bool) or not isinstance(r, int) or r < 0 for r in counts):
            raise ValueError(f"{self.name}: expected r >= 0, whole numbers of tokens, got {self.r}")

    @property
    def weighs_keys(self) -> bool:
        return self.proportional_attention

    def own_schedule(self, encoder: Encoder) -> list[int] | None:
        if self.r is None:
            return None
        wanted = numbers(self.r, encoder.num_layers)
        if len(wanted) > encoder.num_layers:
            raise ValueError(f"{self.name}: expected r for at most {encoder.num_layers} layers, got {len(wanted)}")
        return clamped(wanted[: encoder.feature_layer + 1], encoder.num_patches)

    def vision_layers(self, ctx: LayerContext) -> LayerMerge:
        return merge_even_odd(ctx)


def first(r: int | tuple[int, float]) -> int:
    return r[0] if isinstance(r, tuple) else r


def numbers(r: int | tuple[int, float] | list[int], layers: int) -> list[int]:
    """ToMe's r, one number a layer.

    Example:
        >>> numbers((8, -1), 12)
        [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    """
    if isinstance(r, list):
        return r + [0] * (layers - len(r))
    if isinstance(r, int):
        return [r] * layers
    start = int(r[0] * (1 - r[1]))
    step = (2 * r[0] - 2 * start) / max(layers - 1, 1)
    return [int(start + step * layer) for layer in range(layers)]


def merge_even_odd(ctx: LayerContext, *, metric: Tensor | None = None, weighted: bool = True) -> LayerMerge:
    """One layer of ToMe, by the keys or another metric [images, n, D]; without weights the plain mean, and no sizes."""
    merged, size, owner = bipartite_merge(
        ctx.tokens,
        ctx.metric if metric is None else metric,
        ctx.r,
        size=ctx.size if weighted else None,
        protect=ctx.protect,
        order="tome",
    )
    merge = LayerMerge(merged, owner, size if weighted else None)
    if ctx.prefix < 2:
        return merge  # [CLS] has an even position, and unmerged ones come first
    rows = torch.arange(merged.shape[1], device=owner.device).repeat(owner.shape[0], 1)
    front = torch.arange(-ctx.prefix, 0, device=owner.device).expand(owner.shape[0], -1)
    return merge.permuted(rows.scatter(1, owner[:, : ctx.prefix], front).argsort(1))
