"""timm's VisionTransformer, with the plain pre-norm blocks of ViT, DeiT and AugReg models.

What it relies on: ``blocks[i]`` of class Block with ``norm1``, ``attn`` (its ``qkv``, ``num_heads`` and the argument
``attn_mask``), ``ls1``, ``drop_path1`` and their second halves, ``num_prefix_tokens``, and ``pool``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vtkernels.zoo.adapters.attachment import Attachment
from vtkernels.zoo.adapters.vit import LayerMerger, TowerRun, VitLayer
from vtkernels.zoo.proportional import size_bias
from vtkernels.zoo.recipe import Encoder, Stage


@dataclass(frozen=True)
class TimmLayer(VitLayer):
    model: Any

    @property
    def projection(self) -> nn.Module:
        return self.module.attn.qkv

    def keys(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (3, self.module.attn.num_heads, -1))[:, :, 1].transpose(1, 2)

    def attend(self, x: Tensor, bias: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None:
            raise ValueError("vtkernels.zoo: expected no attn_mask; the tokens merge")
        block = self.module
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=bias)))

    def feed_forward(self, x: Tensor) -> Tensor:
        block = self.module
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def check(self, weighs_keys: bool) -> None:
        if self.model.grad_checkpointing:
            raise ValueError("vtkernels.zoo: expected no gradient checkpointing, which runs layers again out of order")


class TimmVitAdapter(Attachment):
    """The classifier's [CLS], distillation and register tokens stay; pooling over patches weighs them by size."""

    model_class: ClassVar[type] = VisionTransformer
    serves: ClassVar[tuple[Stage, ...]] = ("vision_layers",)

    def describe_encoder(self) -> Encoder:
        for block in self.model.blocks:
            if type(block).forward is not Block.forward:
                raise ValueError(
                    f"vtkernels.zoo: expected blocks of class {Block.__module__}.{Block.__name__}, got {type(block)}"
                )
        return Encoder(
            num_layers=len(self.model.blocks),
            feature_layer=len(self.model.blocks) - 1,
            grid=tuple(self.model.patch_embed.grid_size),
            has_cls=self.model.has_class_token,
        )

    def install(self) -> None:
        layers = [TimmLayer(block, self.model) for block in self.model.blocks]
        self.merger = self.install_merger(layers, prefix=self.model.num_prefix_tokens)
        if self.merger is not None:
            self.override(self.model, "pool", functools.partial(self._wrap_pool, self.merger))

    @property
    def last(self) -> TowerRun | None:
        return None if self.merger is None else self.merger.run

    def _wrap_pool(self, merger: LayerMerger, pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
        model = self.model

        def weighted_pool(x: Tensor, pool_type: str | None = None) -> Tensor:
            kind = model.global_pool if pool_type is None else pool_type
            size = None if merger.run is None else merger.run.size
            if size is None or x.shape[:2] != size.shape:  # other tokens than those of the last run
                return pool(x, pool_type)
            if kind not in ("avg", "avgmax") and not (kind == "map" and merger.recipe.weighs_keys):
                return pool(x, pool_type)
            if not model.pool_include_prefix:
                x, size = x[:, model.num_prefix_tokens :], size[:, model.num_prefix_tokens :]
            if model.attn_pool is not None:
                return model.attn_pool(x, attn_mask=size_bias(size, dtype=x.dtype))
            weight = size.unsqueeze(-1)
            mean = ((x * weight).sum(1) / weight.sum(1)).to(x.dtype)
            return 0.5 * (x.amax(dim=1) + mean) if kind == "avgmax" else mean

        return weighted_pool
