"""STC: the cacher computes a frame's stale tokens alone in the encoder; the pruner keeps each frame's novel tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vtkernels import prune_gather
from vtkernels.zoo.recipe import Context, Encoder, Kept, Recipe
from vtkernels.zoo.reuse import LayerReuse, ReuseContext

_BANDWIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)


@dataclass(frozen=True)
class STCPruner(Recipe):
    """Keeps the ``keep`` tokens of each frame that are least like the frame and like the video so far.

    With f the mean of the frame's projected tokens and h the mean of all frames' means up to and with this one:

    - ``gaussian`` (the released default): only the half of the channels in which the frame's tokens vary least,
      ``int(C / 2)`` of them; tokens x and h L2-normalised in these, f the mean of the normalised tokens;
      ``score(x) = sum over a in {1/8, 1/4, 1/2, 1, 2} of exp(-|x - f|^2 / 2a) + exp(-|x - h|^2 / 2a)``, lowest kept.
    - ``dual_anchor`` (the paper): ``(1 - cos(x, h)) / 2 + (1 - cos(x, f)) / 2``, highest kept.

    Raster order, float32. A frame never looks ahead; a prompt's images are its video, one frame a chunk.

    Args:
        score: ``gaussian`` or ``dual_anchor``.

    Deviations from the released code: it keeps the history in the channels selected for each chunk, other ones every
    time and in another order; here the history has all channels and the frame's selection is taken of it. Newline
    tokens of grid models are no concern of an encoder's tokens.
    """

    name: ClassVar[str] = "stc_pruner"
    title: ClassVar[str] = "Accelerating Streaming Video Large Language Models via Hierarchical Token Compression"
    reference: ClassVar[str] = "arXiv:2512.00891"
    status: ClassVar[str] = "verified: read in the authors' code; dual_anchor from third-party notes on the paper"
    video: ClassVar[bool] = True

    score: Literal["gaussian", "dual_anchor"] = "gaussian"

    def __post_init__(self) -> None:
        self.one_of("score", ("gaussian", "dual_anchor"))

    def after_projector(self, ctx: Context) -> Kept:
        score = _gaussian if self.score == "gaussian" else _dual_anchor
        novelty = torch.cat([score(ctx.tokens[video].detach().float()) for video in ctx.videos])
        return prune_gather(ctx.tokens, novelty, ctx.keep)


def _history(means: Tensor) -> Tensor:
    """[F, C] -> [F, C]: the mean of the frames up to and with each one."""
    return means.cumsum(0) / torch.arange(1, len(means) + 1, device=means.device).unsqueeze(1)


def _gaussian(frames: Tensor) -> Tensor:
    """Novelty [F, n] of float32 [F, n, C]: minus the similarity."""
    steady = frames.var(1, unbiased=False).argsort(dim=1, stable=True)[:, : frames.shape[2] // 2].unsqueeze(1)
    history = _history(frames.mean(1)).unsqueeze(1).gather(2, steady)
    tokens = normalize(frames.gather(2, steady.expand(-1, frames.shape[1], -1)), dim=-1)
    anchors = torch.stack([tokens.mean(1, keepdim=True), normalize(history, dim=-1)])
    distance = (tokens - anchors).square().sum(-1)
    return -torch.stack([torch.exp(-distance / (2 * a)) for a in _BANDWIDTHS]).sum((0, 1))


def _dual_anchor(frames: Tensor) -> Tensor:
    """Novelty [F, n] of float32 [F, n, C]."""
    means = frames.mean(1)
    anchors = torch.stack([means, _history(means)]).unsqueeze(2)
    return (0.5 - 0.5 * cosine_similarity(frames, anchors, dim=-1)).sum(0)


@dataclass(frozen=True)
class STCCacher(LayerReuse):
    """Every ``interval``-th frame is a reference; the frames after it compute only their stale tokens in the encoder.

    In each layer the stale tokens of a frame are the patches whose keys (full width, all heads) have the least cosine
    with the reference's: :func:`stale_tokens`. All keys are new; the other patches take values, attention output
    (behind the output projection) and MLP output of the reference, on residuals of their own. All tokens go to the
    language model. The budget is the number of stale patches of a frame.

    Args:
        ratio: the budget as the method states it, in place of ``keep``: ``max(1, int(ratio * patches))``; released:
            0.25.
        interval: frames from one reference to the next; released: 2, every second frame.
        metric: ``cosine`` or ``dot`` (the least similar are stale), ``l1`` or ``l2`` (the farthest).

    A prompt's images are its video, one frame a chunk. Deviation: [CLS], of which the method's towers have none, is
    computed anew in every frame and is not counted. The README's rule, a cosine below 0.85, is not that of the released
    code and is left out.
    """

    name: ClassVar[str] = "stc_cacher"
    title: ClassVar[str] = STCPruner.title
    reference: ClassVar[str] = STCPruner.reference
    status: ClassVar[str] = "verified: read in the authors' code"
    video: ClassVar[bool] = True

    ratio: float | None = None
    interval: int = 2
    metric: Literal["cosine", "l1", "l2", "dot"] = "cosine"

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ValueError(f"stc_cacher: expected ratio in [0, 1], got {self.ratio}")
        if self.interval < 1:
            raise ValueError(f"stc_cacher: expected interval >= 1, got {self.interval}")
        self.one_of("metric", ("cosine", "l1", "l2", "dot"))

    def budget(self, encoder: Encoder, keep: int | None) -> int | None:
        if self.ratio is None:
            return keep
        own = max(1, int(self.ratio * encoder.num_patches))
        if keep not in (None, own):
            raise ValueError(f"stc_cacher: ratio={self.ratio} is {own} tokens of a frame, got keep={keep}; give either")
        return own

    def references(self, frames: int) -> list[int]:
        return [frame - frame % self.interval for frame in range(frames)]

    def vision_layers(self, ctx: ReuseContext) -> Tensor:
        return stale_tokens(ctx.keys, ctx.cached, ctx.refresh, self.metric)


def stale_tokens(
    key: Tensor,
    cached: Tensor,
    count: int,
    metric: Literal["cosine", "l1", "l2", "dot"] = "cosine",
) -> Tensor:
    """The ``count`` tokens of each frame whose keys are least like the reference's (ties: the lower index).

    Args:
        key, cached: [frames, n, C], the layer's keys of this frame and of the reference, over the full width.
        metric: ``cosine``, ``dot``, or the distances ``l1`` and ``l2``.

    Returns:
        int64 [frames, count], ascending.
    """
    key, cached = key.detach().float(), cached.detach().float()
    if metric == "cosine":
        change = -cosine_similarity(key, cached, dim=-1)
    elif metric == "dot":
        change = -(key * cached).sum(-1)
    else:
        change = (key - cached).norm(p=1 if metric == "l1" else 2, dim=-1)
    return prune_gather(key, change, count)[1]
