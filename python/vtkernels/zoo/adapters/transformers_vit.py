"""CLIPVisionModel and SiglipVisionModel, alone or inside a vision-language model.

What it relies on, checked by tests/models/test_zoo_canary.py: ``encoder.layers[i]`` with ``layer_norm1``, ``self_attn``
(which takes an additive ``attention_mask`` and returns a tuple), ``layer_norm2`` and ``mlp``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel

from vtkernels.zoo.adapters.attachment import Attachment
from vtkernels.zoo.adapters.reuse import install_reuser
from vtkernels.zoo.adapters.vit import TowerRun, VitLayer
from vtkernels.zoo.recipe import Encoder, Stage

_BIASED = ("sdpa", "eager")  # attention implementations that take an additive mask
_TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class TransformersLayer(VitLayer):
    @property
    def projection(self) -> nn.Module:
        return self.module.self_attn.k_proj

    def keys(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.module.self_attn.num_heads, -1)).transpose(1, 2)

    def attend(self, x: Tensor, bias: Tensor | None, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attention_mask is not None:
            raise ValueError("vtkernels.zoo: expected no attention_mask in the vision encoder; its tokens merge")
        return x + self.module.self_attn(self.module.layer_norm1(x), attention_mask=bias, **kwargs)[0]

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.module.mlp(self.module.layer_norm2(x))

    def check(self, weighs_keys: bool) -> None:
        if self.module.gradient_checkpointing and self.module.training:
            raise ValueError("vtkernels.zoo: expected no gradient checkpointing, which runs layers again out of order")
        implementation = self.module.self_attn.config._attn_implementation
        if weighs_keys and implementation not in _BIASED:
            raise ValueError(
                f"vtkernels.zoo: proportional attention needs attn_implementation {' or '.join(_BIASED)} in the vision "
                f"encoder, got {implementation}"
            )

    def check_reuse(self) -> None:
        """Raises ValueError where the layer cannot be run on some of its tokens."""
        self.check(weighs_keys=False)
        if self.module.training and self.module.self_attn.dropout:
            raise ValueError(
                "vtkernels.zoo: expected no attention dropout in the vision encoder; its frames reuse rows"
            )


class TransformersVitAdapter(Attachment):
    """A tower alone: ``last_hidden_state`` has fewer tokens, each layer after the first merging one too.

    To a method that reuses results, the images of a call are the frames of one video.
    """

    model_class: ClassVar[tuple[type, ...]] = (CLIPVisionModel, SiglipVisionModel)
    serves: ClassVar[tuple[Stage, ...]] = ("vision_layers",)
    reuses: ClassVar[bool] = True

    def describe_encoder(self) -> Encoder:
        return tower_facts(self.model.config, self.model.config.num_hidden_layers - 1)

    def install(self) -> None:
        layers = [TransformersLayer(module) for module in encoder_layers(self.model)]
        self.merger = self.install_merger(layers, prefix=int(self.encoder.has_cls))
        install_reuser(self, layers, lambda images: [slice(0, images)])

    @property
    def last(self) -> TowerRun | None:
        return None if self.merger is None else self.merger.run


def tower_facts(config: Any, feature_layer: int) -> Encoder:
    """Of a vision configuration. Raises ValueError for one that is not served."""
    if config.model_type not in _TOWERS:
        raise ValueError(f"vtkernels.zoo: expected a {' or '.join(_TOWERS)} tower, got {config.model_type}")
    side = config.image_size // config.patch_size
    return Encoder(
        num_layers=config.num_hidden_layers,
        feature_layer=feature_layer,
        grid=(side, side),
        has_cls=config.model_type == "clip_vision_model",
    )


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    found = [module for name, module in tower.named_modules() if name.endswith("encoder.layers")]
    if len(found) != 1 or not isinstance(found[0], nn.ModuleList):
        raise RuntimeError(f"vtkernels.zoo: expected one encoder.layers in {type(tower).__name__}, found {len(found)}")
    return found[0]
