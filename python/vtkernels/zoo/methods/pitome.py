"""PiToMe: in every layer of the encoder, tokens of large homogeneous regions merge; the others are protected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtkernels import bipartite_match, energy_scores, merge_apply
from vtkernels.zoo.merging import LayerContext, LayerMerge, LayerMerging, geometric
from vtkernels.zoo.methods.tome import merge_even_odd
from vtkernels.zoo.recipe import Encoder

_RELEASED_BSM = 13  # of 24 layers


@dataclass(frozen=True)
class PiToMe(LayerMerging):
    """Merges r tokens a layer among the 2r of highest energy, between attention and MLP.

    Energy: ``E_i = mean_j f(cos(m_i, m_j) - margin_l)`` over all tokens j, i included, ``f(x) = x`` above 0 and
    ``alpha * (exp(x) - 1)`` below, with ``margin_l = margin * (1 - l / L)`` in layer l of L. A token that resembles
    many others has a high energy. Of the 2r highest, in descending order, the first, third, ... are sources and the
    others destinations; every source merges into its most similar destination, by the mean weighted by size. The metric
    m is the mean of the layer's keys over heads. [CLS] and other tokens at the front take no part.

    ``keep`` merges the same share of the tokens in every layer up to the one whose output is used.

    Args:
        ratio: the paper's own parameter instead of ``keep``, in [0.5, 1]: ``r = floor(T - T * ratio)`` in every layer.
        margin: 0.9 for language-image towers and AugReg ViTs; the released code has 0.75 for DeiT and MAE.
        alpha: of the energy.
        proportional_attention: ``log(size)`` is added to the logits of each key. Off, as in the released code, whose
            blocks do not pass the sizes on; the paper describes it on.
        energy_bsm: in the first half of the layers (rounded up) split all tokens by energy and merge the r best edges,
            as the released patch for DeiT does.
        released_llava: what the released code runs on LLaVA's CLIP-L, all at once: tokens merge after the MLP, the
            metric is the layer's output, the mean is plain, and the first 13 of 24 layers merge as ToMe does (in other
            towers, the layers of that relative depth).
        order: of the output tokens, by their first patch, or the ``"method"``'s own: protected tokens, then
            destinations, both by descending energy.

    Deviations from the released code: ties go to the lower index; similarities are float32.
    """

    name: ClassVar[str] = "pitome"
    title: ClassVar[str] = "Accelerating Transformers with Spectrum-Preserving Token Merging"
    reference: ClassVar[str] = "arXiv:2405.16148"
    status: ClassVar[str] = "verified: read in the authors' code"

    ratio: float | None = None
    margin: float = 0.9
    alpha: float = 1.0
    proportional_attention: bool = False
    energy_bsm: bool = False
    released_llava: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and not 0.5 <= self.ratio <= 1:
            raise ValueError(f"pitome: expected ratio in [0.5, 1], got {self.ratio}")
        if self.released_llava and (self.energy_bsm or self.proportional_attention):
            raise ValueError("pitome: expected released_llava without energy_bsm and proportional_attention")

    @property
    def weighs_keys(self) -> bool:
        return self.proportional_attention

    @property
    def after_mlp(self) -> bool:
        return self.released_llava

    def own_schedule(self, encoder: Encoder) -> list[int] | None:
        if self.ratio is None:
            return None
        schedule, tokens = [], encoder.num_patches
        for layer in range(encoder.feature_layer + 1):
            # The released ToMe layers count [CLS] too.
            counted = tokens + (encoder.has_cls and self._merges_as_tome(layer, encoder.num_layers))
            schedule.append(min(math.floor(counted - counted * self.ratio), tokens // 2))
            tokens -= schedule[-1]
        return schedule

    def schedule_for(self, encoder: Encoder, keep: int) -> list[int]:
        return geometric(encoder.num_patches, keep, encoder.feature_layer + 1)

    def vision_layers(self, ctx: LayerContext) -> LayerMerge:
        metric = ctx.tokens.detach() if self.released_llava else ctx.metric
        if self._merges_as_tome(ctx.layer, ctx.num_layers):
            return merge_even_odd(ctx, metric=metric, weighted=False)
        margin = self.margin * (1 - ctx.layer / ctx.num_layers)
        split_all = self.energy_bsm and 2 * ctx.layer < ctx.num_layers
        own = _match(metric[:, ctx.prefix :], ctx.r, margin, self.alpha, split_all)
        front = torch.arange(ctx.prefix, device=own.device).expand(own.shape[0], -1)
        owner = torch.cat([front, own + ctx.prefix], 1)
        rows = owner.shape[1] - ctx.r
        if self.released_llava:
            return LayerMerge(merge_apply(ctx.tokens, owner, rows, reduce="mean")[0], owner)
        merged, size = merge_apply(ctx.tokens, owner, rows, weight=ctx.size)
        return LayerMerge(merged, owner, size)

    def _merges_as_tome(self, layer: int, num_layers: int) -> bool:
        return self.released_llava and layer < round(_RELEASED_BSM * num_layers / 24)


def _match(metric: Tensor, r: int, margin: float, alpha: float, split_all: bool) -> Tensor:
    """The owner map int64 [B, n] of one layer, its rows in the method's order."""
    n = metric.shape[1]
    rank = energy_scores(metric, margin=margin, alpha=alpha).argsort(dim=1, descending=True, stable=True).argsort(1)
    owner, similarity = bipartite_match(metric, r, rank=rank, protect=None if split_all else rank >= 2 * r)
    destination = rank % 2 == 1
    taken = torch.zeros_like(rank).scatter_reduce(1, owner, destination.long(), "amax").gather(1, owner) > 0
    if split_all:  # unmerged sources by descending similarity, then destinations by energy
        place = torch.where(destination, n + rank, similarity.argsort(dim=1, descending=True, stable=True).argsort(1))
    else:  # protected tokens, then destinations, both by energy
        place = torch.where(rank < 2 * r, n + rank, rank)
    survivors = place.where(destination | ~taken, 3 * n).argsort(1)[:, : n - r]
    return owner.gather(1, survivors).argsort(1).gather(1, owner)
