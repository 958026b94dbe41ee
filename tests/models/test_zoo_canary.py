"""Fails when transformers renames what the LLaVA adapter relies on, before anything subtler does."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from tests.models import tiny


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_modules(tower):
    model = tiny.llava(tower=tower)
    base = model.model
    assert isinstance(base.multi_modal_projector, nn.Module)
    layers = [module for name, module in base.vision_tower.named_modules() if name.endswith("encoder.layers")]
    assert len(layers) == 1 and len(layers[0]) == 3
    attention = layers[0][0].self_attn
    assert isinstance(attention.q_proj, nn.Linear) and isinstance(attention.k_proj, nn.Linear)
    assert attention.num_heads == 4
    assert model.config.vision_config.model_type == f"{tower}_vision_model"
    assert isinstance(model.config.image_token_id, int)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert hasattr(model.config.text_config, name)


def test_calls():
    model = tiny.llava()
    forward = inspect.signature(model.forward).parameters
    for name in ("input_ids", "pixel_values", "attention_mask", "position_ids", "labels", "vision_feature_layer"):
        assert name in forward
    generate = inspect.signature(model.generate).parameters
    for name in ("inputs", "generation_config", "logits_processor", "stopping_criteria", "streamer"):
        assert name in generate
    assert "pixel_values" in inspect.signature(model.model.get_image_features).parameters


@torch.no_grad()
def test_forward_and_generate_take_the_features_from_the_base_model(monkeypatch):
    """Both must call the instance's get_image_features, with pixel_values by name, and read pooler_output."""
    model, batch, calls = tiny.llava(), tiny.inputs([(1, 4)]), []
    original = model.model.get_image_features

    @functools.wraps(original)  # generate reads the signature
    def watched(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setitem(model.model.__dict__, "get_image_features", watched)
    model(**batch)
    model.generate(**batch, max_new_tokens=2)
    assert len(calls) == 2 and all("pixel_values" in kwargs for kwargs in calls)
    features = original(pixel_values=batch["pixel_values"], return_dict=True).pooler_output
    assert [tuple(image.shape) for image in features] == [(16, 32)]


@torch.no_grad()
def test_the_projector_gets_the_patches_of_the_selected_layer_once():
    model, batch, seen = tiny.llava(), tiny.inputs([(2, 4)]), []
    watch = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: seen.append(args))
    model.model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True)
    watch.remove()
    hidden = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    ((features,),) = seen
    assert torch.equal(features, hidden[-2][:, 1:])
    layer = model.model.vision_tower.encoder.layers[1]  # the layer whose output hidden_states[-2] is, of three
    outputs = []
    watch = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.model.vision_tower(batch["pixel_values"])
    watch.remove()
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    assert torch.equal(output, hidden[-2])


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_layer_is_its_two_halves(tower):
    """Merging runs them apart, with an additive mask."""
    model = tiny.llava(tower=tower).model.vision_tower
    layer, x = model.encoder.layers[0], torch.randn(2, 5, 32)
    assert layer.gradient_checkpointing is False
    assert layer.self_attn.config._attn_implementation == "sdpa"
    attended = x + layer.self_attn(layer.layer_norm1(x), attention_mask=None)[0]
    assert torch.equal(layer(x, None), attended + layer.mlp(layer.layer_norm2(attended)))
    mask = torch.tensor([0.0, 0.0, -torch.inf, 0.0, -torch.inf]).expand(2, 1, 1, 5)
    biased = layer.self_attn(x, attention_mask=mask)[0]
    torch.testing.assert_close(biased[:, :1], layer.self_attn(x[:, [0, 1, 3]], attention_mask=None)[0][:, :1])
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(torch.randn(1, 3, 56, 56))
    assert seen[0][0].shape[-1] == 32 and seen[0][1] is None


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_attention_is_its_projections(tower):
    """Reuse runs them on some of the tokens."""
    attention = tiny.llava(tower=tower).model.vision_tower.encoder.layers[0].self_attn
    assert attention.dropout == 0.0
    x = torch.randn(2, 5, 32)
    query, key, value = (
        project(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = (query @ key.transpose(2, 3) * attention.scale).softmax(-1) @ value
    expected = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, attention_mask=None)[0], expected)


@torch.no_grad()
def test_the_language_models_layers():
    """The decoder gets embeddings by name; its layers get all but the hidden states by name, and return a tensor."""
    model, batch, seen, outer = tiny.llava(), tiny.inputs([(1, 4), (1, 2)]), [], []
    decoder = model.model.language_model
    decoder.register_forward_pre_hook(lambda module, args, kwargs: outer.append((args, kwargs)), with_kwargs=True)
    for layer in decoder.layers:
        layer.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
        )
        assert layer.self_attn.head_dim == 8 and layer.gradient_checkpointing is False
        assert isinstance(layer.self_attn.q_proj, nn.Linear) and isinstance(layer.self_attn.k_proj, nn.Linear)
    cache = model(**batch, use_cache=True).past_key_values
    assert outer[0][0] == () and {"inputs_embeds", "attention_mask", "past_key_values"} <= outer[0][1].keys()
    for args, kwargs, output in seen:
        assert len(args) == 1 and isinstance(output, torch.Tensor)
        assert {"attention_mask", "position_embeddings", "position_ids", "past_key_values"} <= kwargs.keys()
        assert kwargs["past_key_values"] is cache and not cache.is_compileable
    length = batch["input_ids"].shape[1]
    assert [cache.get_seq_length(layer) for layer in range(2)] == [length, length]


def test_masks_are_made_for_a_layer_of_the_cache():
    parameters = inspect.signature(create_causal_mask).parameters
    assert {"config", "inputs_embeds", "attention_mask", "past_key_values", "layer_idx"} <= parameters.keys()
