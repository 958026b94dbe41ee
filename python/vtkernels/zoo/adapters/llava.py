"""LLaVA (LlavaForConditionalGeneration) with a CLIP or SigLIP vision tower.

What it relies on, checked by tests/models/test_zoo_canary.py on every supported transformers version: the base model's
``get_image_features`` (called by forward and by generate, its ``pooler_output`` a list of one [n, D] a image), its
``vision_tower`` with ``encoder.layers[i].self_attn.{q_proj,k_proj,num_heads}``, and its ``multi_modal_projector``,
which the features pass through once, [CLS] removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtkernels.attention import recording
from vtkernels.zoo.adapters.attachment import Claim
from vtkernels.zoo.adapters.base import Adapter, Encoding, LastRun
from vtkernels.zoo.adapters.decoder import DecoderStage
from vtkernels.zoo.adapters.reuse import install_reuser
from vtkernels.zoo.adapters.transformers_vit import TransformersLayer, encoder_layers, tower_facts
from vtkernels.zoo.caching import note_states
from vtkernels.zoo.merging import LayerMerging
from vtkernels.zoo.recipe import Encoder, Stage, videos_of


class LlavaAdapter(Adapter):
    model_class: ClassVar[type] = LlavaForConditionalGeneration
    serves: ClassVar[tuple[Stage, ...]] = (
        "vision_layers",
        "vision_encoder",
        "after_projector",
        "between_layers",
        "cache",
    )
    reuses: ClassVar[bool] = True

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def describe_encoder(self) -> Encoder:
        config = self.model.config
        vision = config.vision_config
        encoder = tower_facts(vision, _feature_layer(config.vision_feature_layer, vision.num_hidden_layers))
        strategy = "default" if encoder.has_cls else "full"
        if config.vision_feature_select_strategy != strategy:
            raise ValueError(
                f"vtkernels.zoo: expected vision_feature_select_strategy={strategy!r} with a {vision.model_type} tower "
                f"(one token a patch), got {config.vision_feature_select_strategy!r}"
            )
        return encoder

    def special_ids(self) -> set[int]:
        text = self.model.config.text_config
        ids = {self.image_token_id}
        for value in (text.bos_token_id, text.eos_token_id, text.pad_token_id):
            ids.update(value if isinstance(value, list) else [value] if value is not None else [])
        return ids

    def attach(self, claim: Claim) -> None:
        layers = self.model.config.vision_feature_layer
        if isinstance(claim.recipe, LayerMerging) and isinstance(layers, list) and len(layers) > 1:
            raise ValueError(
                f"{claim.recipe.name}: expected one vision_feature_layer, whose tokens merge in the layers before, got "
                f"{layers}"
            )
        super().attach(claim)

    def install_family(self) -> None:
        base = self.model.model
        self.override(base, "get_image_features", self._wrap_get_image_features)
        layers = encoder_layers(base.vision_tower)
        for index in sorted(self.layers()):
            attention: Any = layers[index].self_attn
            self.hook(attention.q_proj.register_forward_hook(self._capture(index, "query", attention.num_heads)))
            self.hook(attention.k_proj.register_forward_hook(self._capture(index, "key", attention.num_heads)))
        blocks = [TransformersLayer(layer) for layer in layers]
        self.merger = self.install_merger(blocks, int(self.encoder.has_cls), lambda: self.encoding is not None)
        install_reuser(self, blocks, lambda images: None if self.encoding is None else videos_of(self.encoding.rows))
        projector = base.multi_modal_projector
        self.hook(projector.register_forward_pre_hook(self._before_projector))
        self.hook(projector.register_forward_hook(self._after_projector))
        claim = self.claims.get("between_layers")
        if claim is not None and claim.keep is not None:
            DecoderStage(claim, base.language_model, self.image_token_id, self._in_work, self)

        claim = self.claims.get("cache")
        layers = base.language_model.layers
        watched = None if claim is None else claim.recipe.watched_layer(len(layers))
        if watched is not None:
            self.hook(layers[watched].register_forward_pre_hook(note_states, with_kwargs=True))

    def _in_work(self) -> LastRun | None:
        """The batch that the model's own method runs on for us."""
        return None if self.served is None else self.last

    def project(self, features: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector.forward(features)

    def encode(self, call: dict[str, Any]) -> BaseModelOutputWithPooling:
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            expected = getattr(self.model.config, name)
            if call.get(name) not in (None, expected):
                raise ValueError(f"vtkernels.zoo: expected {name}={expected!r} as configured, got {call[name]!r}")
        assert self.encoding is not None
        layers: Any = encoder_layers(self.model.model.vision_tower)
        with recording({index: layers[index].self_attn for index in self.layers()}) as self.encoding.passes:
            output = self._get_image_features(pixel_values=call["pixel_values"], return_dict=True)
        # Only this is used from here on; the hidden states of every layer would live as long as generation.
        return _image_output(self.encoding.per_image(output.pooler_output))

    def visual_tokens(self, encoding: Encoding) -> Tensor:
        return torch.cat(list(encoding.output.pooler_output))

    def _wrap_get_image_features(self, original: Callable[..., Any]) -> Callable[..., Any]:
        self._get_image_features = original

        def served_features(*args: Any, **kwargs: Any) -> Any:
            if self.served is None:
                return original(*args, **kwargs)
            features: list[Tensor] = self.served.output.pooler_output
            # Before 5.18, beams repeat each image's pixels instead of its features.
            pixel_values = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
            times = len(pixel_values) // len(features)
            return _image_output([image for image in features for _ in range(times)])

        return served_features

    def _capture(self, layer: int, role: str, heads: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.encoding is not None:
                self.encoding.capture(layer, role, output, heads)

        return hook

    def _before_projector(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        if self.encoding is None:
            return None
        (features,) = args
        self.encoding.start(features, None if self.merger is None else self.merger.patch_owner())
        return (self.encoding.run("vision_encoder", self.claims.get("vision_encoder"), features, features),)

    def _after_projector(self, module: nn.Module, args: tuple[Any, ...], projected: Tensor) -> Tensor:
        if self.encoding is None:
            return projected
        return self.encoding.run("after_projector", self.claims.get("after_projector"), projected, args[0])


def _image_output(features: Any) -> BaseModelOutputWithPooling:
    """What ``get_image_features`` returns, with nothing but a list of one [n, D] an image."""
    return BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]


def _feature_layer(selected: int | list[int], num_layers: int) -> int:
    """The encoder layer whose output is ``hidden_states[selected]``; of several, the deepest."""
    indices = selected if isinstance(selected, list) else [selected]
    # hidden_states holds the embeddings first, so layer i's output is entry i + 1.
    deepest = max(index % (num_layers + 1) for index in indices) - 1
    if deepest < 0:
        raise ValueError(f"vtkernels.zoo: vision_feature_layer={selected} is the embeddings, the output of no layer")
    return deepest
