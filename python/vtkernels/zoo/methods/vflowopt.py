"""VFlowOpt: patches that global rows attend to stay; of the others, one weighted mean a grid cell is recycled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtkernels import attention_scores, merge_apply, prune_gather
from vtkernels.zoo.recipe import Context, Encoder, Merged, Recipe


@dataclass(frozen=True)
class VFlowOpt(Recipe):
    """Scores by the attention that global patches pay, and merges what is left over within cells of the grid.

    With A the head mean of the encoder's attention and ``recv_j = mean_i A_ij``: the global rows are
    ``G = {patches i: recv_i > threshold * mean(recv)}`` and ``importance_j = mean over i in G of A_ij``. Of L tokens
    the ``L - keep + int(L / cell^2)`` least important are candidates; all others stay. Candidates with the same
    ``(floor(row / cell), floor(column / cell))`` become one token, their importance-weighted mean in the place of the
    most important of them (ties: the first). Raster order. So an image keeps ``keep - int(L / cell^2)`` tokens and one
    for each cell that has a candidate: about ``keep``, and its own number.

    Args:
        threshold: how far above the mean a global row is attended to.
        cell: side of a cell in patches, any real number >= 1.
        layer: encoder layer, 0-based; None = the layer whose output the language model gets.

    The defaults are the setting released for 25 % of the tokens. Released with them are 28.68 and 11.76 (50 %), 39.26
    and 17.39 (10 %); the search that finds them is not here. All three give the patch entropy no weight, so it is left
    out. Their cuts before two of the language model's layers are another stage's work.
    Deviations: without a global row, where the released code yields NaN, all rows vote; in an encoder with [CLS], whose
    attention the method was not made for, it votes for recv and is no global row.
    """

    name: ClassVar[str] = "vflowopt"
    title: ClassVar[str] = (
        "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization"
    )
    reference: ClassVar[str] = "arXiv:2508.05211"
    status: ClassVar[str] = "verified: read in the authors' code; encoders with [CLS] are our reading"
    merges: ClassVar[bool] = True

    threshold: float = 34.76
    cell: float = 15.58
    layer: int | None = None

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and self.cell >= 1):
            raise ValueError(
                f"vflowopt: expected threshold >= 0 and cell >= 1, got threshold={self.threshold}, cell={self.cell}"
            )

    def attention_layers(self, encoder: Encoder) -> tuple[int, ...]:
        return (encoder.feature_layer if self.layer is None else self.layer,)

    def after_projector(self, ctx: Context) -> Merged:
        importance = self._importance(ctx)
        images, n = importance.shape
        stay = max(0, ctx.keep - int(n / self.cell**2))
        _, best = prune_gather(ctx.tokens, importance, stay)
        place = _recycled(ctx, importance, best, self.cell)

        survives = place == torch.arange(n, device=place.device)
        row = (survives.flatten().cumsum(0) - 1).view(images, n)
        owner = row.gather(1, place)
        counts = survives.sum(1).tolist()
        # An importance may have underflowed to 0, which is no weight.
        weight = importance.clamp_min(torch.finfo(torch.float32).tiny)
        tokens, _ = merge_apply(
            ctx.tokens.flatten(0, 1)[None], owner.view(1, -1), sum(counts), weight=weight.view(1, -1)
        )
        return Merged(tokens[0], counts, owner)

    def _importance(self, ctx: Context) -> Tensor:
        """float32 [images, n]."""
        (layer,) = self.attention_layers(ctx.encoder)
        query, key = ctx.projections[layer]
        lse = ctx.lse.get(layer)
        received = ctx.attention(layer, voters="all")
        anchors = received > self.threshold * received.mean(1, keepdim=True)
        anchors |= ~anchors.any(1, keepdim=True)
        first = int(ctx.encoder.has_cls)
        scores = []
        for image, chosen in enumerate(anchors):
            rows = ctx.positions[image, chosen] + first
            one = slice(image, image + 1)
            normaliser = None if lse is None else lse[one, :, rows]
            votes = attention_scores(query[one, :, rows], key[one], lse=normaliser)
            scores.append(votes[0, first:][ctx.positions[image]])
        return torch.stack(scores)


def _recycled(ctx: Context, importance: Tensor, best: Tensor, cell: float) -> Tensor:
    """int64 [images, n]: the token in whose place each one ends, itself for ``best`` int64 [images, stay]."""
    images, n = importance.shape
    width = ctx.encoder.grid[1]
    row, column = ctx.positions // width, ctx.positions % width
    group = (row.double() / cell).long() * width + (column.double() / cell).long()
    rank = importance.argsort(dim=1, descending=True, stable=True).argsort(1)
    candidate = torch.ones(images, n, dtype=torch.bool, device=best.device).scatter_(1, best, False)
    # The best candidate of each cell, by its rank; no cell number reaches the number of patches.
    leader = rank.new_full((images, ctx.encoder.num_patches), n)
    leader.scatter_reduce_(1, group, rank.where(candidate, n), "amin")
    place = rank.argsort(1).gather(1, leader.gather(1, group).clamp(max=n - 1))
    return place.where(candidate, torch.arange(n, device=place.device))
