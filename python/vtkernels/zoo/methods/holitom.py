"""HoliTom: what does not change over a run of frames is stored once, the rest is selected frame by frame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtkernels import cluster_dpc_knn, merge_apply, nearest_match, prune_gather, temporal_segments
from vtkernels.zoo.decoder import DecoderContext
from vtkernels.zoo.recipe import Context, Encoder, Kept, Merged, MergedRows, Recipe

_NEIGHBOURS = 7  # of the density


@dataclass(frozen=True)
class HoliTom(Recipe):
    """The outer part on the projected tokens [F, S, C] of a video, the inner part inside the language model.

    Outer, with R = keep / S:

    1. A position is alike in two adjacent frames when the cosine of its tokens is above ``tau``. The video is cut into
       segments so that ``sum of (positions alike over the whole segment) * (length - 1)``, the ``gain``, is largest.
    2. ``R' = min(R / ((F * S - gain) / (F * S)), 1)``.
    3. Static positions of a segment (those alike over all of it) are averaged over its frames; of these s tokens
       ``round(s * R')`` cluster centres remain (DPC-KNN, k = min(7, centres)), each ``beta * centre + (1 - beta) * mean
       of the others of its cluster``.
    4. Of the d other positions of each frame ``total = ceil(d * R')`` remain: the ``round(total * (1 - contextual))``
       with the largest attention received in the encoder (mean over heads and query rows), in raster order, then as
       many centres of the others as are missing, merged as in 3.
    5. A segment's static tokens stand before those of its first frame.

    Inner: of the prompt's N visual tokens the ``round(N * (1 - inner))``, at least one, to which its last token attends
    most in decoder layer k - 1 (softmax over all tokens, mean over heads) enter layer k. Each other one goes into the
    kept one with the most similar hidden state (:func:`fold_dropped`). Kept tokens keep their positions; the layers
    before k keep the cache of all N. A budget of all patches leaves the outer part nothing to do: the inner one alone.
    ``keep="all"`` attaches neither.

    Args:
        tau: published: 0.80, and 0.65 for R = 0.10.
        beta: what a centre keeps of itself; None = the plain mean of centre and others.
        contextual: share of a frame's tokens that are cluster centres. Published scripts: 0.
        max_window: longest segment in frames.
        layer: encoder layer of the attention, 0-based; None = the layer whose output the language model gets.
        inner: share of the visual tokens folded inside the language model; 0 = the outer part alone.
        inner_layer: k, 0-based; None = that at the depth of layer 18 of 28 (Qwen2-7B), as the published scripts set it;
            the released code's default is 3.
        fold: ``sequential``, or ``mean`` = the plain mean of a kept token and those folded into it.

    A single image is a video of one frame: its most attended tokens. Round is Python's (ties to even); budgets are
    float64. Deviations from the released code: no random tie-breaker in the density (equal densities: the lower
    position is denser); features as the projector gives them, where LLaVA-OneVision pools 2 x 2 of them; the form for
    models with newline tokens is left out, since LLaVA has none; the inner part sees the visual tokens of a prompt as
    one span also where words stand between the frames.
    """

    name: ClassVar[str] = "holitom"
    title: ClassVar[str] = "HoliTom: Holistic Token Merging for Fast Video Large Language Models"
    reference: ClassVar[str] = "arXiv:2505.21334"
    status: ClassVar[str] = "verified: read in the authors' code"
    merges: ClassVar[bool] = True
    video: ClassVar[bool] = True

    tau: float = 0.8
    beta: float | None = 0.6
    contextual: float = 0.0
    max_window: int = 1024
    layer: int | None = None
    inner: float = 0.5
    inner_layer: int | None = None
    fold: Literal["sequential", "mean"] = "sequential"

    def __post_init__(self) -> None:
        if not 0 <= self.contextual <= 1:
            raise ValueError(f"holitom: expected contextual in [0, 1], got {self.contextual}")
        if self.max_window < 1:
            raise ValueError(f"holitom: expected max_window >= 1, got {self.max_window}")
        if not 0 <= self.inner < 1:
            raise ValueError(f"holitom: expected inner in [0, 1), got {self.inner}")
        self.one_of("fold", ("sequential", "mean"))

    def attention_layers(self, encoder: Encoder) -> tuple[int, ...]:
        return (encoder.feature_layer if self.layer is None else self.layer,)

    def after_projector(self, ctx: Context) -> Merged:
        (layer,) = self.attention_layers(ctx.encoder)
        scores = ctx.attention(layer, voters="all")
        built = MergedRows(ctx.tokens)
        for video in ctx.videos:
            self._video(built, ctx.tokens, scores, video, ctx.keep)
        return built.done()

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        if self.inner == 0:
            return ()
        if self.inner_layer is not None:
            return (self.inner_layer,)
        return (max(1, min(num_layers - 1, round(18 * num_layers / 28))),)

    def between_layers(self, ctx: DecoderContext) -> Kept:
        count = max(1, round(ctx.tokens.shape[1] * (1 - self.inner)))
        _, kept = prune_gather(ctx.tokens.detach(), ctx.attention(), count)
        return fold_dropped(ctx.tokens, kept, self.fold), kept

    def _video(self, built: MergedRows, tokens: Tensor, scores: Tensor, video: slice, keep: int) -> None:
        features = tokens[video].detach().float()
        frames, n = features.shape[:2]
        alike = cosine_similarity(features[:-1], features[1:], dim=-1)
        segment, is_static, gain = temporal_segments(alike[None], threshold=self.tau, max_window=self.max_window)
        share = min(keep / n / ((frames * n - int(gain)) / (frames * n)), 1.0)
        start = video.start
        for length in segment[0].unique_consecutive(return_counts=True)[1].tolist():
            self._segment(built, tokens, scores, start, start + length, is_static[0, start - video.start], share)
            start += length

    def _segment(
        self, built: MergedRows, tokens: Tensor, scores: Tensor, start: int, end: int, static: Tensor, share: float
    ) -> None:
        frames, n = tokens[start:end], tokens.shape[1]
        num_static = int(static.sum())
        mean = frames.float().mean(0, keepdim=True).to(frames.dtype)
        still, still_owner = self._clusters(mean, static[None], round(num_static * share))

        total = math.ceil((n - num_static) * share)
        dominant = round(total * (1 - self.contextual))
        moving = ~static.expand(end - start, n)
        kept, indices = prune_gather(frames, scores[start:end], dominant, drop_mask=~moving)
        is_kept = torch.zeros_like(moving).scatter_(1, indices, True)
        context, owner = self._clusters(frames, moving & ~is_kept, total - dominant)
        owner = torch.where(is_kept, is_kept.cumsum(1) - 1, owner.where(owner < 0, owner + dominant))

        built.add(start, still[0], still_owner.expand(end - start, n))
        for frame in range(start, end):
            index = frame - start
            built.add(frame, torch.cat([kept[index], context[index]]), owner[index : index + 1])

    def _clusters(self, tokens: Tensor, valid: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
        """Cluster centres [B, clusters, C] of the valid tokens, and the centre of each token, int64 [B, S], or -1."""
        if clusters == 0:
            return tokens[:, :0], torch.full(valid.shape, -1, device=valid.device)
        centers, owner = cluster_dpc_knn(tokens.detach(), clusters, k=_NEIGHBOURS, valid=valid)
        if self.beta is None:
            return merge_apply(tokens, owner, clusters, reduce="mean")[0], owner
        return merge_apply(tokens, owner, clusters, reduce="beta", center=centers, beta=self.beta)[0], owner


def fold_dropped(hidden: Tensor, kept: Tensor, how: Literal["sequential", "mean"] = "sequential") -> Tensor:
    """The inner part's merge: each dropped token goes into the kept one with the most similar hidden state (cosine).

    One after another, in order of position, ``kept <- (kept + dropped) / 2``; with ``how="mean"`` the plain mean of a
    kept token and its dropped ones.

    Args:
        hidden: [B, N, C], the visual tokens.
        kept: int64 [B, K], ascending.

    Returns:
        [B, K, C].
    """
    owner, _ = nearest_match(hidden.detach(), kept)
    if how == "mean":
        return merge_apply(hidden, owner, kept.shape[1], reduce="mean")[0]
    return merge_apply(hidden, owner, kept.shape[1], reduce="sequential_half", center=kept)[0]
