"""FoPru: focal pruning, of single tokens or of whole grid rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtkernels import prune_gather
from vtkernels.zoo.recipe import Context, Encoder, Kept, Recipe


@dataclass(frozen=True)
class FoPru(Recipe):
    """Scores a patch by the encoder's self-attention that it receives.

    ``s_j = mean over query rows of reduce_h attn(layer)[h, :, j]``. Strategy ``rank`` keeps the ``keep`` largest;
    ``row`` scores each grid row by the mean of its patches and keeps every patch of the best ``round(keep / w)`` rows
    (Python's round, ties to even), so it keeps a multiple of the grid width w, which may differ from ``keep``.
    Both in raster order.

    Args:
        strategy: ``rank`` or ``row``.
        layer: encoder layer, 0-based; None = the layer whose output the language model gets.
        query_rows: ``all`` rows vote, or only the ``cls`` row (needs a [CLS] token).
        head_reduce: ``mean``, ``max`` or ``sum`` over heads (after the mean over query rows).

    Inferred: no code was released and the full text was not read. The two strategies and the reordering are known;
    the layer, the reduction over query rows and heads and the row aggregate are our reading, hence options.
    """

    name: ClassVar[str] = "fopru"
    title: ClassVar[str] = "FoPru: Focal Pruning for Efficient Large Vision-Language Models"
    reference: ClassVar[str] = "arXiv:2411.14164"
    status: ClassVar[str] = "inferred: the score's layer and reductions, and the row aggregate"

    strategy: Literal["rank", "row"] = "rank"
    layer: int | None = None
    query_rows: Literal["all", "cls"] = "all"
    head_reduce: Literal["mean", "max", "sum"] = "mean"

    def __post_init__(self) -> None:
        self.one_of("strategy", ("rank", "row"))
        self.one_of("query_rows", ("all", "cls"))
        self.one_of("head_reduce", ("mean", "max", "sum"))

    @property
    def needs_cls(self) -> bool:
        return self.query_rows == "cls"

    def attention_layers(self, encoder: Encoder) -> tuple[int, ...]:
        return (encoder.feature_layer if self.layer is None else self.layer,)

    def check(self, encoder: Encoder, keep: int) -> None:
        width = encoder.grid[1]
        if self.strategy == "row" and round(keep / width) == 0:
            raise ValueError(
                f"fopru: strategy='row' keeps whole grid rows of {width} tokens; keep={keep} rounds to no row"
            )

    def vision_encoder(self, ctx: Context) -> Kept:
        (layer,) = self.attention_layers(ctx.encoder)
        scores = ctx.attention(layer, voters=self.query_rows, head_reduce=self.head_reduce)
        if self.strategy == "rank":
            return prune_gather(ctx.tokens, scores, ctx.keep)
        return _keep_rows(ctx, scores)


def _keep_rows(ctx: Context, scores: torch.Tensor) -> Kept:
    height, width = ctx.encoder.grid
    images, _, channels = ctx.tokens.shape
    # A grid row is one long token of w * C channels: selecting rows is the same op as selecting tokens.
    grid_rows = ctx.tokens.reshape(images, height, width * channels)
    row_scores = scores.reshape(images, height, width).mean(-1)
    kept, rows = prune_gather(grid_rows, row_scores, round(ctx.keep / width))
    indices = rows.unsqueeze(-1) * width + torch.arange(width, device=rows.device)
    return kept.reshape(images, -1, channels), indices.flatten(1)
