"""Attach and detach: without a trace, composed, and with one clear error for everything that cannot work."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import tiny
from vtkernels import zoo
from vtkernels.zoo.adapters.llava import _feature_layer
from vtkernels.zoo.recipe import Context, Kept

METHODS = tiny.pruning_methods()


@pytest.fixture
def model():
    return tiny.llava()


@pytest.fixture
def batch():
    return tiny.inputs([(1, 4), (2, 6)])


def snapshot(model):
    """Every attribute of every submodule, containers by content.

    transformers hooks the tower itself at the first run; that is no trace of ours, so it runs before the first look.
    """
    with torch.no_grad():
        model(**tiny.inputs([(1, 2)]))
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()}
        for name, module in model.named_modules()
    }


def same(before, after):
    assert before.keys() == after.keys()
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys(), name
        for key, value in attributes.items():
            if isinstance(value, dict):
                assert list(value) == list(after[name][key]), (name, key)
                assert all(item is after[name][key][slot] for slot, item in value.items()), (name, key)
            else:
                assert value is after[name][key] or value == after[name][key], (name, key)


@pytest.mark.parametrize("method", METHODS)
def test_detach_leaves_no_trace(model, batch, method):
    with torch.no_grad():
        logits = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    config = copy.deepcopy(model.config.to_dict()), model.generation_config.to_dict()
    before = snapshot(model)
    handle = zoo.apply(model, method, keep=5)
    with torch.no_grad():
        assert model(**batch).logits.shape != logits.shape
    model.generate(**batch, max_new_tokens=4)
    handle.remove()
    same(before, snapshot(model))
    assert (model.config.to_dict(), model.generation_config.to_dict()) == config
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), tokens)


def test_detach_gives_back_the_callers_own_attributes(model):
    def forward(*args, **kwargs):
        return type(model).forward(model, *args, **kwargs)

    model.forward = forward
    zoo.apply(model, "fastervlm", keep=5).remove()
    assert model.__dict__["forward"] is forward


def test_detach_after_an_error(model, batch):
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), zoo.apply(model, "fastervlm", keep=5):
        raise ZeroDivisionError
    same(before, snapshot(model))
    # A call that fails leaves nothing behind that the next call could pick up.
    with zoo.apply(model, "fastervlm", keep=5):
        with pytest.raises(ValueError):
            model.generate(**batch, max_new_tokens=2, no_such_argument=1)
        with torch.no_grad():
            features = model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True).pooler_output
        assert len(features[0]) == 16


def test_signatures_stay(model):
    before = [inspect.signature(f) for f in (model.forward, model.generate, model.model.get_image_features)]
    with zoo.apply(model, "fastervlm", keep=5):
        assert [inspect.signature(f) for f in (model.forward, model.generate, model.model.get_image_features)] == before


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_methods_on_two_stages(model, batch, first_out):
    before = snapshot(model)
    handles = [zoo.apply(model, "fastervlm", keep=8), zoo.apply(model, "todre", keep=3)]
    with torch.no_grad():
        model(**batch)
        assert handles[0].last is handles[1].last and handles[0].last.indices.shape == (3, 3)
        handles.pop(first_out).remove()
        model(**batch)
    assert handles[0].last.indices.shape == (3, handles[0].keep)
    handles[0].remove()
    same(before, snapshot(model))


def test_remove_twice_is_harmless(model):
    handle = zoo.apply(model, "fastervlm", keep=5)
    handle.remove()
    other = zoo.apply(model, "fastervlm", keep=4)
    handle.remove()
    assert "forward" in model.__dict__
    other.remove()
    with pytest.raises(RuntimeError, match="fastervlm: this handle was removed"), handle:
        pass


def test_a_recipe_can_be_given_itself(model):
    recipe = zoo.make_recipe("hiprune", alpha=0.2)
    with zoo.apply(model, recipe, keep=8) as handle:
        assert handle.recipe is recipe
    with pytest.raises(TypeError, match="hiprune: options belong to the recipe, got alpha"):
        zoo.apply(model, recipe, keep=8, alpha=0.1)


# The registry.


def test_registry():
    listed = {method.name: method for method in zoo.methods()}
    assert list(listed) == [
        *["fastervlm", "vtc_cls", "fopru", "hiprune", "todre", "mmtok"],
        *["tome", "pitome", "tinychart", "auroracap", "simvlg"],
        *["aim", "visiondrop", "vflowopt", "recoverable_compression", "sit"],
        *["holitom", "bvllm", "centerclip", "stc_cacher", "stc_pruner"],
        *["kivi", "vidkv", "zipvl", "kvquant", "lookm", "video_xl2", "dynamic_llava", "packed", "random", "uniform"],
    ]
    for method in listed.values():
        assert method.title and method.reference and method.status and method.stages
        assert set(method.stages) <= set(zoo.STAGES)
        assert type(zoo.make_recipe(method.name)).__doc__
    assert listed["fastervlm"].needs_cls and listed["vtc_cls"].needs_cls and not listed["hiprune"].needs_cls
    questions = [name for name, method in listed.items() if method.reads_question]
    assert questions == ["mmtok", "recoverable_compression", "vidkv"]
    videos = [name for name, method in listed.items() if method.video]
    assert videos == ["holitom", "bvllm", "centerclip", "stc_cacher", "stc_pruner", "video_xl2"]
    assert listed["mmtok"].options == {"alpha": 0.5, "tau_tv": 0.02, "tau_vv": 0.2, "tokenizer": None}


def test_default_layers_at_clip_l_geometry():
    """LLaVA-1.5: 24 layers, features from layer 22."""
    encoder = zoo.Encoder(num_layers=24, feature_layer=22, grid=(24, 24), has_cls=True)
    layers = {m.name: zoo.make_recipe(m.name).attention_layers(encoder) for m in zoo.methods()}
    assert layers["fastervlm"] == layers["fopru"] == (22,)
    assert layers["vtc_cls"] == tuple(range(16, 23))
    assert layers["hiprune"] == (8, 22)
    assert layers["todre"] == (23,)


@pytest.mark.parametrize(
    "selected, layers, expected", [(-2, 24, 22), (-1, 24, 23), (-2, 3, 1), (3, 3, 2), ([-2, -5], 24, 22)]
)
def test_feature_layer(selected, layers, expected):
    assert _feature_layer(selected, layers) == expected


# Errors: one each, naming what was expected.


@pytest.mark.parametrize(
    "method, options, error, message",
    [
        ("fastvlm", {}, ValueError, "unknown method 'fastvlm'; known methods: fastervlm, vtc_cls, fopru"),
        ("hiprune", {"beta": 1}, TypeError, "hiprune: unknown option beta; options: alpha, object_layer"),
        ("uniform", {"seed": 1}, TypeError, "uniform: unknown option seed; options: none"),
        ("hiprune", {"alpha": 2.0}, ValueError, r"hiprune: expected alpha in \[0, 1\], got 2.0"),
        ("hiprune", {"alpha": 0.7, "keep": 4}, ValueError, "1 anchors with up to 5 tokens"),
        ("hiprune", {"object_layer": 9}, ValueError, r"hiprune: expected an encoder layer in \[0, 2\], got 8"),
        ("fopru", {"strategy": "col"}, ValueError, "fopru: expected strategy to be one of rank, row, got 'col'"),
        ("fopru", {"strategy": "row", "keep": 2}, ValueError, "keep=2 rounds to no row"),
        ("vtc_cls", {"start_layer": 2}, ValueError, "vtc_cls: expected start_layer <= 1"),
        ("vtc_cls", {"start_layer": -1}, ValueError, r"expected an encoder layer in \[0, 2\], got -1"),
        ("todre", {"mode": "sum"}, ValueError, "todre: expected mode to be one of max_sum, max_min"),
        ("mmtok", {"tau_tv": 0}, ValueError, "mmtok: expected alpha >= 0, tau_tv > 0"),
        ("fastervlm", {"keep": 0}, ValueError, r"fastervlm: expected keep in \[1, 16\] tokens an image, got 0"),
        ("fastervlm", {"keep": -3}, ValueError, r"expected keep in \[1, 16\]"),
        ("fastervlm", {"keep": 17}, ValueError, r"expected keep in \[1, 16\]"),
        ("fastervlm", {"keep": 0.0}, ValueError, r"expected a keep ratio in \(0, 1\], got 0.0"),
        ("fastervlm", {"keep": 1.5}, ValueError, r"expected a keep ratio in \(0, 1\], got 1.5"),
        ("fastervlm", {"keep": math.nan}, ValueError, r"expected a keep ratio in \(0, 1\], got nan"),
        ("fastervlm", {"keep": "half"}, TypeError, "expected keep as an int, a float or 'all', got 'half'"),
        ("fastervlm", {"keep": True}, TypeError, "expected keep as an int, a float or 'all', got True"),
    ],
)
def test_bad_arguments(model, method, options, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        zoo.apply(model, method, **{"keep": 4, **options})
    same(before, snapshot(model))


def test_ratio_rounds_to_the_nearest_token(model):
    for ratio, tokens in [(0.25, 4), (0.1, 2), (0.01, 1), (1.0, 16)]:
        with zoo.apply(model, "fastervlm", keep=ratio) as handle:
            assert handle.keep == tokens


def test_unknown_model():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(TypeError, match="no adapter for LlamaForCausalLM; supported: LlavaForConditionalGeneration"):
        zoo.apply(llama, "fastervlm", keep=5)


@pytest.mark.parametrize("method, options", [("fastervlm", {}), ("vtc_cls", {}), ("fopru", {"query_rows": "cls"})])
def test_cls_is_needed(method, options):
    with pytest.raises(ValueError, match=rf"{method}: needs a \[CLS\] token"):
        zoo.apply(tiny.llava(tower="siglip"), method, keep=5, **options)


def test_unsupported_feature_selection():
    model = tiny.llava(vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="expected vision_feature_select_strategy='default' with a clip_vision_model"):
        zoo.apply(model, "fastervlm", keep=5)


def test_one_stage_is_claimed_once(model, batch):
    with zoo.apply(model, "fastervlm", keep=5) as handle:
        with pytest.raises(ValueError, match="hiprune: stage vision_encoder of this model is claimed by fastervlm"):
            zoo.apply(model, "hiprune", keep=5)
        with torch.no_grad():
            model(**batch)
        assert handle.last.indices.shape == (3, 5)
    zoo.apply(model, "hiprune", keep=5).remove()


def test_a_later_stage_cannot_keep_more(model, batch):
    zoo.apply(model, "fastervlm", keep=5)
    zoo.apply(model, "todre", keep=8)
    with pytest.raises(ValueError, match="todre: keep=8 is more than the 5 tokens"):
        model(**batch)


@dataclass(frozen=True)
class DecodingRecipe(zoo.Recipe):
    name: ClassVar[str] = "decoding_recipe"

    def decoding(self, ctx: Context) -> Kept:
        raise AssertionError("never reached")


def test_unserved_stage(model):
    with pytest.raises(
        NotImplementedError, match="decoding_recipe: stage decoding is not served for LlavaForConditional"
    ):
        zoo.apply(model, DecodingRecipe(), keep=5)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_inputs_that_pruning_cannot_follow(model, batch, call):
    with zoo.apply(model, "fastervlm", keep=5):
        run = getattr(model, call)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        with pytest.raises(ValueError, match="expected input_ids; inputs_embeds alone"):
            run(inputs_embeds=embeds, pixel_values=batch["pixel_values"])
        with pytest.raises(ValueError, match="expected pixel_values; mm_encoder_outputs"):
            run(input_ids=batch["input_ids"], mm_encoder_outputs={"image": object()})
        with pytest.raises(ValueError, match="expected 16 image placeholders per image and 2 images in all"):
            run(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"][:2])
        with pytest.raises(ValueError, match=r"expected attention_mask.shape = \[B, L\]"):
            run(**{**batch, "attention_mask": batch["attention_mask"][:, None, None]})
        with pytest.raises(ValueError, match="expected vision_feature_layer=-2 as configured, got -1"):
            run(**batch, vision_feature_layer=-1)


def test_a_further_turn_with_images_is_refused(model):
    batch = tiny.inputs([(1, 4)])
    with zoo.apply(model, "fastervlm", keep=5):
        out = model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True)
        with pytest.raises(ValueError, match="expected no image in a prompt that continues a cache"):
            model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2)
