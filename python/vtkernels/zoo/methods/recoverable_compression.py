"""Recoverable Compression: outliers of [CLS] attention, outliers of text similarity, and clusters of what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vtkernels import attention_scores
from vtkernels.zoo.recipe import Context, Encoder, Merged, MergedRows, Recipe

_NEIGHBOURS = 32  # that a cluster's centre takes in
_TEXT_WEIGHT = 50


@dataclass(frozen=True)
class RecoverableCompression(Recipe):
    """The number of tokens follows from the image: each step takes the share of scores that are outliers.

    ``share_k(s)`` is the part of the values s with a local outlier factor (k neighbours) above 1.5. With a the [CLS]
    attention of the last layer, its heads taken as one (scale ``C^-0.5``), t the text similarity, n patches:

    1. vision: the ``int(n * share_20(a))`` best of a, V;
    2. recovery: t of V set to min(t); the ``int((n - |V|) * share_20(t))`` best of t. Both sorted: the main tokens.
    3. of the others: the ``int(main * share_10(a))`` best of a are centres; each becomes
       ``x_c + sum of a_j * x_j`` over the 32 others (other centres too, itself not) with the largest
       ``cos(key_j, key_c) + 50 * t_j``; and one residual token is ``sum of a_j * x_j`` over all that are no centres.
       Without a centre there is no residual. Main tokens, centres by descending a, residual.

    ``owner`` of a token that is neither main nor centre is the residual, which holds it whatever else does.

    Args:
        text: the similarity t, float [images, n], of a :class:`Context`. The paper's is between CLIP's own text and
            patch embeddings, ``cos * 768^-0.5``; a LLaVA carries no CLIP text encoder, so None takes the same formula
            on the projected patches and the mean of the question's word embeddings in the language model's table.
        layer: encoder layer of a and of the keys, 0-based; None = the last one.

    The method has no budget; ``keep`` is the most that an image may keep. Where the steps want more, the later ones get
    less. Deviations: where nothing stands out, the best token of a stays, so that an image is never empty; the released
    code takes the keys of step 3 from other tokens (an index into the others used as one into all), here they are their
    own; any batch size; float32.
    """

    name: ClassVar[str] = "recoverable_compression"
    title: ClassVar[str] = (
        "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information"
    )
    reference: ClassVar[str] = "arXiv:2409.01179"
    status: ClassVar[str] = "verified: read in the authors' code; the text similarity without CLIP's is ours"
    merges: ClassVar[bool] = True

    text: Callable[[Context], Tensor] | None = None
    layer: int | None = None

    @property
    def needs_cls(self) -> bool:
        return True

    @property
    def reads_question(self) -> bool:
        return self.text is None

    def attention_layers(self, encoder: Encoder) -> tuple[int, ...]:
        return (encoder.num_layers - 1 if self.layer is None else self.layer,)

    def vision_encoder(self, ctx: Context) -> Merged:
        (layer,) = self.attention_layers(ctx.encoder)
        query, key = (part.transpose(1, 2).flatten(2) for part in ctx.projections[layer])
        attention = attention_scores(query[:, None, :1], key[:, None])[:, 1:]
        text = (_question_similarity if self.text is None else self.text)(ctx).detach().float()
        keys = normalize(key[:, 1:].float(), dim=-1)
        built = MergedRows(ctx.tokens)
        for image, x in enumerate(ctx.tokens):
            rows, owner = _compress(x, attention[image], text[image], keys[image], ctx.keep)
            built.add(image, rows, owner.unsqueeze(0))
        return built.done()


def outlier_share(values: Tensor, k: int) -> float:
    """The part of ``values`` [n] whose local outlier factor with ``k`` neighbours is above 1.5."""
    n = len(values)
    if n < 2:
        return 0.0
    distance = (values.double().unsqueeze(1) - values.double()).abs()
    distance.fill_diagonal_(torch.inf)
    near, index = distance.sort(dim=1, stable=True)
    near, index = near[:, : min(k, n - 1)], index[:, : min(k, n - 1)]
    reach = torch.maximum(near, near[index, -1])
    density = 1 / (reach.mean(1) + 1e-10)
    return float((density[index].mean(1) / density > 1.5).sum()) / n


def _question_similarity(ctx: Context) -> Tensor:
    table = [ctx.embed(ids).float() for ids in ctx.questions]
    words = torch.stack([word.sum(0) / max(1, len(word)) for word in table]).detach()
    patches = ctx.project(ctx.features).float()
    return cosine_similarity(patches, words[list(ctx.rows)].unsqueeze(1), dim=-1) * patches.shape[-1] ** -0.5


def _compress(x: Tensor, attention: Tensor, text: Tensor, keys: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """[n, C] -> [kept, C] of one image, and the row of each token, int64 [n]."""
    n = len(x)
    owner = torch.full((n,), -1, device=x.device)
    seen = _best(attention, min(keep, max(1, int(n * outlier_share(attention, 20)))))
    text_left = text.index_fill(0, seen, float(text.min()))
    wanted = int((n - len(seen)) * outlier_share(text_left, 20))
    read = _best(text.index_fill(0, seen, -torch.inf), min(keep - len(seen), wanted))
    main = torch.cat([seen, read]).sort().values
    owner[main] = torch.arange(len(main), device=x.device)

    others = (owner < 0).nonzero().flatten()
    wanted = int(len(main) * outlier_share(attention[others], 10))
    picked = _best(attention[others], min(wanted, keep - len(main) - 1, len(others)))
    if len(picked) == 0:
        return x[main], owner
    centers = others[picked]
    closeness = keys[centers] @ keys[others].T + _TEXT_WEIGHT * text[others]
    closeness[torch.arange(len(picked), device=x.device), picked] = -torch.inf
    near = others[closeness.argsort(dim=1, descending=True, stable=True)[:, : min(_NEIGHBOURS, len(others) - 1)]]
    owner[others] = len(main) + len(centers)
    owner[centers] = len(main) + torch.arange(len(centers), device=x.device)
    weighted = attention.unsqueeze(1) * x
    residual = weighted[owner == len(main) + len(centers)].sum(0, keepdim=True)
    return torch.cat([x[main], (x[centers] + weighted[near].sum(1)).to(x.dtype), residual.to(x.dtype)]), owner


def _best(scores: Tensor, count: int) -> Tensor:
    """The ``count`` largest, descending; ties: the lower index."""
    return scores.argsort(descending=True, stable=True)[: max(0, count)]
