"""AIM, part 1: every frame's tokens are merged by halves until the budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtkernels import bipartite_merge
from vtkernels.zoo.recipe import Context, Merged, Recipe


@dataclass(frozen=True)
class AIM(Recipe):
    """Repeated bipartite merging of the projected tokens of each image or frame, never across frames.

    A pass on n tokens: even and odd positions form the two sets, the similarity is the cosine of the tokens themselves,
    and each merged row is the plain mean of a token of odd position and all that chose it, however many patches they
    hold already. It merges ``floor(n / 2)`` tokens, the last pass as many as are left to merge. The row order of a pass
    is: unmerged tokens of even position by descending similarity, then those of odd position.

    The published budgets (1/4 for video, 1/8 for an image) are whole halvings; any other ends in a smaller pass, which
    is our reading.

    Part 1 only: part 2, which prunes inside the language model by PageRank of its attention, is another stage's work.
    """

    name: ClassVar[str] = "aim"
    title: ClassVar[str] = "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning (merging)"
    reference: ClassVar[str] = "arXiv:2412.03248"
    status: ClassVar[str] = "verified: read in the authors' code; inferred: budgets that are no power of two"
    merges: ClassVar[bool] = True

    def after_projector(self, ctx: Context) -> Merged:
        return Merged.even(*merge_by_halves(ctx.tokens, ctx.keep))


def merge_by_halves(tokens: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """[images, n, C] -> [images, keep, C], and the row that each token went into, int64 [images, n]."""
    images, n, _ = tokens.shape
    owner = torch.arange(n, device=tokens.device).expand(images, n)
    while n > keep:
        r = n // 2 if n // 2 > keep else n - keep
        tokens, _, rows = bipartite_merge(tokens, tokens.detach(), r, order="tome")
        owner = rows.gather(1, owner)
        n -= r
    return tokens, owner
