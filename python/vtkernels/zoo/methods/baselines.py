"""Baselines that look at nothing: every evaluation needs them as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtkernels import prune_gather
from vtkernels.zoo.recipe import Context, Kept, Recipe


@dataclass(frozen=True)
class Random(Recipe):
    """A random subset of the patches, drawn once from ``seed``.

    Every image gets the same subset: a draw per image would make an image's result depend on its place in the batch.
    Average over seeds for an expectation.
    """

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random subset (baseline)"
    reference: ClassVar[str] = "none"
    status: ClassVar[str] = "baseline"

    seed: int = 0

    def vision_encoder(self, ctx: Context) -> Kept:
        scores = torch.rand(ctx.tokens.shape[1], generator=torch.Generator().manual_seed(self.seed))
        return prune_gather(ctx.tokens, scores.to(ctx.tokens.device).expand(ctx.tokens.shape[:2]), ctx.keep)


@dataclass(frozen=True)
class Uniform(Recipe):
    """Patches spread evenly over the grid: ``round(sqrt(keep * h / w))`` evenly spaced rows share ``keep`` as evenly as
    integers allow, and each row's patches are evenly spaced. ``keep`` is met exactly.
    """

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "Uniform grid (baseline)"
    reference: ClassVar[str] = "none"
    status: ClassVar[str] = "baseline"

    def vision_encoder(self, ctx: Context) -> Kept:
        indices = torch.tensor(_even_grid(ctx.keep, *ctx.encoder.grid), device=ctx.tokens.device)
        return ctx.take(indices.expand(ctx.tokens.shape[0], -1))


def _even_grid(keep: int, height: int, width: int) -> list[int]:
    wanted = round((keep * height / width) ** 0.5)
    num_rows = min(max(wanted, -(-keep // width)), height, keep)  # enough rows to hold keep, and none empty
    indices = []
    for i, row in enumerate(_centres(num_rows, height)):
        share = (i + 1) * keep // num_rows - i * keep // num_rows
        indices += [row * width + column for column in _centres(share, width)]
    return indices


def _centres(count: int, length: int) -> list[int]:
    """``count`` distinct points of ``range(length)``: the centres of equal parts."""
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]
