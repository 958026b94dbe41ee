"""Running the layers of a transformers vision tower on chosen tokens of the frames between reference frames.

While a recipe is attached, the layers have ``forward`` as an instance attribute, which runs the layer's own modules:
on all tokens of the reference frames, on the chosen ones of the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vtkernels.zoo.adapters.attachment import Attachment
from vtkernels.zoo.recipe import Encoder
from vtkernels.zoo.reuse import LayerReuse, ReuseContext

if TYPE_CHECKING:
    from vtkernels.zoo.adapters.transformers_vit import TransformersLayer


@dataclass(frozen=True)
class _Frames:
    """The frames of one run: which are references, and what the others reuse."""

    references: Tensor  # int64 [R]
    others: Tensor  # int64 [O]
    source: Tensor  # int64 [O], into ``references``

    @classmethod
    def of(cls, recipe: LayerReuse, videos: Sequence[slice], device: torch.device) -> _Frames:
        reference = [video.start + r for video in videos for r in recipe.references(video.stop - video.start)]
        own = [frame for frame, r in enumerate(reference) if r == frame]
        others = [frame for frame, r in enumerate(reference) if r != frame]
        source = [own.index(reference[frame]) for frame in others]
        return cls(*(torch.tensor(part, dtype=torch.long, device=device) for part in (own, others, source)))

    def join(self, references: Tensor, others: Tensor) -> Tensor:
        """[R, n, C] and [O, n, C] in the order of the frames."""
        order = torch.cat([self.references, self.others]).argsort()
        return torch.cat([references, others])[order]


def rows_of(x: Tensor, indices: Tensor) -> Tensor:
    """[O, n, C] -> [O, m, C] at ``indices`` int64 [O, m]."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def refreshed(cached: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """``cached`` [O, n, C] with ``rows`` [O, m, C] at ``indices`` int64 [O, m]."""
    return cached.scatter(1, indices.unsqueeze(-1).expand_as(rows), rows)


# The frames of each video of a run with so many images; None leaves the run alone.
Videos = Callable[[int], Sequence[slice] | None]


def install_reuser(owner: Attachment, layers: Sequence[TransformersLayer], videos: Videos) -> None:
    """The claim of ``vision_layers``, if it reuses anything, in the tower's layers."""
    claim = owner.claims.get("vision_layers")
    if claim is None or not isinstance(claim.recipe, LayerReuse):
        return
    if claim.keep is None or claim.keep == owner.encoder.num_patches:
        return
    readers = {c.recipe.name for c in owner.claims.values() if c.recipe.attention_layers(owner.encoder)}
    if readers:
        raise ValueError(
            f"{claim.recipe.name}: computes some of the queries that {', '.join(sorted(readers))} scores with; attach "
            "methods that read no attention of the vision encoder"
        )
    reuser = LayerReuser(claim.recipe, claim.keep, owner.encoder, videos)
    for index, layer in enumerate(layers):
        owner.override(layer.module, "forward", functools.partial(reuser.wrap, index, layer))


class LayerReuser:
    """Runs a recipe in the layers of one tower."""

    def __init__(self, recipe: LayerReuse, refresh: int, encoder: Encoder, videos: Videos):
        self.recipe = recipe
        self.refresh = refresh
        self.encoder = encoder
        self.prefix = int(encoder.has_cls)
        self.videos = videos
        self._frames: _Frames | None = None

    def wrap(self, index: int, layer: TransformersLayer, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The layer's ``forward``, reusing."""

        def reusing_forward(x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            if index == 0:
                self._start(x, layer)
            if self._frames is None:
                return forward(x, attention_mask, **kwargs)
            if attention_mask is not None:
                raise ValueError(
                    "vtkernels.zoo: expected no attention_mask in the vision encoder; its frames reuse rows"
                )
            return self._through(index, layer, x, self._frames)

        return reusing_forward

    def _start(self, x: Tensor, layer: TransformersLayer) -> None:
        videos = self.videos(len(x))
        frames = None if videos is None else _Frames.of(self.recipe, videos, x.device)
        self._frames = None if frames is None or len(frames.others) == 0 else frames
        if self._frames is not None:
            layer.check_reuse()

    def _through(self, index: int, layer: TransformersLayer, x: Tensor, frames: _Frames) -> Tensor:
        first, others, source = frames.references, frames.others, frames.source
        module, attention = layer.module, layer.module.self_attn
        h = module.layer_norm1(x)
        key = attention.k_proj(h)
        chosen = self._chosen(index, key, frames)

        value = attention.v_proj(h[first])
        attended = self._attend(attention, attention.q_proj(h[first]), key[first], value)
        rows = rows_of(h[others], chosen)
        value = refreshed(value[source], attention.v_proj(rows), chosen)
        update = self._attend(attention, attention.q_proj(rows), key[others], value)
        x = x + frames.join(attended, refreshed(attended[source], update, chosen))

        out = module.mlp(module.layer_norm2(x[first]))
        update = module.mlp(module.layer_norm2(rows_of(x[others], chosen)))
        return x + frames.join(out, refreshed(out[source], update, chosen))

    def _chosen(self, index: int, key: Tensor, frames: _Frames) -> Tensor:
        """int64 [O, prefix + refresh]: [CLS] and the recipe's patches."""
        patches = key.detach()[:, self.prefix :]
        context = ReuseContext(
            keys=patches[frames.others],
            cached=patches[frames.references[frames.source]],
            layer=index,
            num_layers=self.encoder.num_layers,
            refresh=self.refresh,
        )
        chosen = self.recipe.vision_layers(context) + self.prefix
        prefix = torch.arange(self.prefix, device=key.device).expand(len(chosen), -1)
        return torch.cat([prefix, chosen], dim=1)

    def _attend(self, attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[frames, m, C] of queries [frames, m, C], keys and values [frames, n, C], output projection applied."""
        query, key, value = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        mixed = scaled_dot_product_attention(query, key, value, scale=attention.scale)
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))
