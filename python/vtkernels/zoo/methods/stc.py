"""STC: the pruner keeps each frame's novel tokens; the cacher finds the tokens that an encoder layer must recompute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vtkernels import prune_gather
from vtkernels.zoo.recipe import Context, Kept, Recipe

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


def stale_tokens(
    key: Tensor,
    cached: Tensor,
    ratio: float = 0.25,
    metric: Literal["cosine", "l1", "l2", "dot"] = "cosine",
) -> Tensor:
    """STC-Cacher's rule: the tokens of a frame that an encoder layer computes anew; the others reuse the reference's.

    The ``max(1, int(ratio * n))`` tokens whose keys are least like the reference frame's (ties: the lower index).
    The rest of the method needs a layer of the encoder that runs on these tokens alone, which no adapter serves yet.

    Args:
        key, cached: [frames, n, C], the layer's keys of this frame and of the reference, over the full width.
        metric: ``cosine``, ``dot``, or the distances ``l1`` and ``l2``.

    Returns:
        int64 [frames, stale], ascending.
    """
    key, cached = key.detach().float(), cached.detach().float()
    if metric == "cosine":
        change = -cosine_similarity(key, cached, dim=-1)
    elif metric == "dot":
        change = -(key * cached).sum(-1)
    elif metric in ("l1", "l2"):
        change = (key - cached).norm(p=1 if metric == "l1" else 2, dim=-1)
    else:
        raise ValueError(f"stc_cacher: expected metric to be one of cosine, l1, l2, dot, got {metric!r}")
    _, stale = prune_gather(key, change, max(1, int(ratio * key.shape[1])))
    return stale


def refreshed(cached: Tensor, rows: Tensor, stale: Tensor) -> Tensor:
    """``cached`` [frames, n, C] (values, attention or MLP output) with ``rows`` [frames, stale, C] in their places."""
    return cached.scatter(1, stale.unsqueeze(-1).expand_as(rows), rows)
