"""B-VLLM's merging: frames like an earlier one join it, then each frame's tokens are merged by halves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtkernels import bipartite_match, merge_apply
from vtkernels.zoo.methods.aim import merge_by_halves
from vtkernels.zoo.recipe import Context, Merged, MergedRows, Recipe


@dataclass(frozen=True)
class BVLLM(Recipe):
    """Temporal, then spatial merging of a video's projected tokens [F, n, C].

    Temporal: with ``s = (cos + 1) / 2`` between descriptors of frames, each frame i looks at the earlier frames j < i
    for its most similar one (ties: the earliest) and merges into it when ``s > threshold``. A kept frame becomes the
    mean, position by position, of itself and the frames that chose it. Chains are not followed: a frame that chose a
    merged one is in no kept frame, and is dropped.

    Spatial: of the m kept frames each gets ``min(n, int(max(1, keep * F / m)))`` tokens, by repeated bipartite merging
    as in :class:`AIM`: ``floor(n / 2)`` at a time while more than that, then the remainder; plain means, sizes are not
    carried from pass to pass.

    Args:
        threshold: of s; at 1.0 no frame merges.
        descriptor: of a video's frames [F, n, C], float [F, D]. None: the mean of each frame's tokens.

    The model itself merges the rows in which its trained temporal Q-Former selects frames, and 32 tokens of a trained
    spatial Q-Former for each. Without these modules, each frame is its own row, described by its mean token: ours. Mean
    tokens are far more alike than selector rows, so the published threshold joins most frames; a video that changes
    slowly needs a higher one, or another descriptor.
    """

    name: ClassVar[str] = "bvllm"
    title: ClassVar[str] = "B-VLLM: A Vision Large Language Model with Balanced Spatio-Temporal Tokens (merging)"
    reference: ClassVar[str] = "arXiv:2412.09919"
    status: ClassVar[str] = "verified: the merging read in the authors' code; what describes a frame is ours"
    merges: ClassVar[bool] = True
    video: ClassVar[bool] = True

    threshold: float = 0.75
    descriptor: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"bvllm: expected threshold in [0, 1], got {self.threshold}")

    def after_projector(self, ctx: Context) -> Merged:
        built = MergedRows(ctx.tokens)
        for video in ctx.videos:
            frames = ctx.tokens[video]
            joined, frame_owner = self._join(frames)
            budget = int(max(1, ctx.keep * len(frames) / len(joined)))
            merged, owner = merge_by_halves(joined, min(frames.shape[1], budget))
            for row in range(len(joined)):
                is_in = frame_owner == row
                first = int(is_in.byte().argmax())  # the kept frame itself: it is the first of those in its row
                built.add(video.start + first, merged[row], owner[row].where(is_in[first:].unsqueeze(1), -1))
        return built.done()

    def _join(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[F, n, C] -> [m, n, C], and the kept frame that each frame is in, int64 [F], or -1."""
        metric = frames.detach().float().mean(1) if self.descriptor is None else self.descriptor(frames.detach())
        owner, _ = bipartite_match(metric.unsqueeze(0), len(frames), threshold=2 * self.threshold - 1, split="causal")
        kept = int(owner.max()) + 1
        joined, _ = merge_apply(frames.flatten(1).unsqueeze(0), owner, kept, reduce="mean")
        return joined[0].unflatten(1, frames.shape[1:]), owner[0]
