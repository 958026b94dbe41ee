"""Frames that reuse a reference frame's results in the vision encoder, against plain loops."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import CLIPVisionModel, SiglipVisionModel

from tests.models import tiny
from tests.models.layer_merging import trace
from tests.reference import merging, reuse
from vtkernels import zoo
from vtkernels.zoo.methods import stc
from vtkernels.zoo.methods.stc import STCCacher

GRID = 4
N = GRID * GRID
PROMPTS = [(1, 4), (4, 9), (0, 5), (3, 7)]
VIDEOS = [slice(0, 1), slice(1, 5), slice(5, 8)]
LAYERS = 3


@dataclass(frozen=True)
class Everything(STCCacher):
    """Whatever the budget, all patches are stale."""

    name: ClassVar[str] = "everything"

    def vision_layers(self, ctx):
        frames, n, _ = ctx.keys.shape
        assert n == N and ctx.num_layers == LAYERS and ctx.refresh == 3 and 0 <= ctx.layer < LAYERS
        return torch.arange(n).repeat(frames, 1)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def llava(request):
    return tiny.llava(1, tower=request.param, grid=GRID, vision_layers=LAYERS)


@pytest.fixture(scope="module")
def tower(llava):
    return alone(llava)


def alone(llava):
    kind = CLIPVisionModel if llava.config.vision_config.model_type == "clip_vision_model" else SiglipVisionModel
    model = kind(llava.config.vision_config).eval()
    model.load_state_dict(llava.model.vision_tower.state_dict())
    return model


def frames(prompts, side="left"):
    """Frames of one prompt are alike but for some patches."""
    batch, start = tiny.inputs(prompts, grid=GRID, side=side), 0
    draw = torch.Generator().manual_seed(5)
    for images, _ in prompts:
        for frame in range(start + 1, start + images):
            change = torch.rand(GRID, GRID, generator=draw) < 0.4
            change = change.repeat_interleave(tiny.PATCH, 0).repeat_interleave(tiny.PATCH, 1)
            batch["pixel_values"][frame] = batch["pixel_values"][frame].where(change, batch["pixel_values"][frame - 1])
        start += images
    return batch


class Watch(STCCacher):
    """Notes what the rule chose, by layer."""

    def vision_layers(self, ctx):
        chosen = super().vision_layers(ctx)
        self.chosen.setdefault(ctx.layer, []).extend(chosen.tolist())
        return chosen

    @classmethod
    def of(cls, **options):
        recipe = cls(**options)
        object.__setattr__(recipe, "chosen", {})
        return recipe


def embedded(tower, pixels):
    """What enters the first layer of a float64 copy, and its layers."""
    exact, seen = copy.deepcopy(tower).double(), []
    (encoder,) = (module for name, module in exact.named_modules() if name.endswith("encoder.layers"))
    watch = encoder[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        exact(pixels.double())
    watch.remove()
    return seen[0], merging.transformers_layers(exact)


CASES = [(4, {}), (1, {"interval": 3}), (7, {"metric": "dot"}), (5, {"metric": "l1"}), (15, {"metric": "l2"})]


@torch.no_grad()
@pytest.mark.parametrize("count, options", CASES)
def test_the_tower_is_the_references(llava, tower, count, options):
    """Alone, where a call's images are one video, and inside LLaVA, where a prompt's are."""
    batch = frames(PROMPTS)
    start, layers = embedded(tower, batch["pixel_values"])
    prefix = int(llava.config.vision_config.model_type == "clip_vision_model")
    settings = (count, options.get("interval", 2), options.get("metric", "cosine"), prefix)

    recipe = Watch.of(**options)
    expected, chosen = reuse.stc_cacher(layers, start[1:5], *settings)
    with zoo.apply(tower, recipe, keep=count):
        hidden = tower(batch["pixel_values"][1:5], output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[-1].double(), expected, rtol=1e-3, atol=1e-3)
    assert [recipe.chosen[layer] for layer in range(LAYERS)] == chosen

    seen = []
    watch = llava.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with zoo.apply(llava, "stc_cacher", keep=count, **options) as handle:
        llava(**batch)
    watch.remove()
    feature = layers[: LAYERS - 1]  # hidden_states[-2]
    rows = torch.cat([reuse.stc_cacher(feature, start[video], *settings)[0] for video in VIDEOS])
    torch.testing.assert_close(seen[0].double(), rows[:, prefix:], rtol=1e-3, atol=1e-3)
    assert handle.last.counts == [N] * 8 and handle.last.indices.tolist() == [list(range(N))] * 8


@torch.no_grad()
def test_everything_stale_is_the_untouched_tower(llava, tower):
    batch = frames(PROMPTS)
    plain, logits = tower(batch["pixel_values"]).last_hidden_state, llava(**batch).logits
    with zoo.apply(tower, Everything(), keep=3):
        torch.testing.assert_close(tower(batch["pixel_values"]).last_hidden_state, plain, rtol=1e-4, atol=1e-5)
    with zoo.apply(llava, Everything(), keep=3):
        torch.testing.assert_close(llava(**batch).logits, logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_equal_frames_are_the_reference(tower):
    """Nothing changed, so that what is reused is what would be computed."""
    pixels = frames(PROMPTS)["pixel_values"][:1]
    plain = tower(pixels).last_hidden_state
    with zoo.apply(tower, "stc_cacher", keep=1):
        out = tower(pixels.repeat(4, 1, 1, 1)).last_hidden_state
    torch.testing.assert_close(out, plain.expand_as(out), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompts", [PROMPTS[1:2], PROMPTS[:3]], ids=["batch1", "batch3"])
def test_keep_all_and_detach_are_the_untouched_model(llava, prompts, side):
    batch = frames(prompts, side)
    before, attributes = (llava(**batch).logits, tiny.new_tokens(llava, batch)), trace(llava)
    for options in ({"keep": "all"}, {"keep": N}, {"ratio": 1.0}, {"keep": 3, "interval": 1}):
        with zoo.apply(llava, "stc_cacher", **options):
            assert torch.equal(llava(**batch).logits, before[0])
            assert torch.equal(tiny.new_tokens(llava, batch), before[1])
    pixels = batch["pixel_values"]
    features = llava.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    with zoo.apply(llava, "stc_cacher", keep=3):
        assert not torch.equal(llava(**batch).logits, before[0])
        outside = llava.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        assert all(torch.equal(a, b) for a, b in zip(outside, features, strict=True))
    after = trace(llava)
    for name, values in attributes.items():
        assert values.keys() == after[name].keys()
        assert all(value is after[name][key] or value == after[name][key] for key, value in values.items()), name
    assert torch.equal(llava(**batch).logits, before[0])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_prompts_alone(llava, side):
    batch = frames(PROMPTS, side)
    with zoo.apply(llava, "stc_cacher", keep=4):
        logits, tokens = llava(**batch).logits, tiny.new_tokens(llava, batch)
        for index in range(len(PROMPTS)):
            row = tiny.row(batch, PROMPTS, index)
            real = batch["attention_mask"][index].bool()
            torch.testing.assert_close(logits[index, real], llava(**row).logits[0], rtol=1e-3, atol=1e-3)
            if side == "left":  # the prompt keeps its length and so its padding, of which generate wants it so
                assert torch.equal(tokens[index : index + 1], tiny.new_tokens(llava, row))


@torch.no_grad()
def test_the_whole_method(llava):
    """Cacher and pruner on one model; the tokens that the pruner chooses among are the cacher's."""
    batch = frames(PROMPTS)
    with zoo.apply(llava, "stc_pruner", keep=5) as pruner:
        before = llava(**batch).logits
        with zoo.apply(llava, "stc_cacher", ratio=0.25) as cacher:
            assert cacher.keep == N // 4 and pruner.keep == 5
            both = llava(**batch).logits
        assert both.shape == before.shape and not torch.equal(both, before)
        assert torch.equal(llava(**batch).logits, before)


def test_gradient_and_bfloat16(llava):
    batch = frames(PROMPTS[1:2])
    weight = llava.model.vision_tower.get_parameter("embeddings.patch_embedding.weight")
    with zoo.apply(llava, "stc_cacher", keep=4):
        (gradient,) = torch.autograd.grad(llava(**batch).logits.square().mean(), weight)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    half = copy.deepcopy(llava).bfloat16()
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with zoo.apply(half, "stc_cacher", keep=4):
        assert tiny.new_tokens(half, batch).shape == (1, 4)


@pytest.mark.parametrize("metric", ["cosine", "dot", "l1", "l2"])
@pytest.mark.parametrize("count", [1, 3, 13])
def test_stale_tokens(metric, count):
    draw = torch.Generator().manual_seed(2)
    key, cached = (torch.randn(3, 13, 8, generator=draw) for _ in range(2))
    chosen = stc.stale_tokens(key, cached, count, metric)
    pairs = zip(key.double(), cached.double(), strict=True)
    assert chosen.tolist() == [reuse.stale(a, b, count, metric) for a, b in pairs]


def test_the_budget_as_the_method_states_it():
    encoder = zoo.Encoder(num_layers=27, feature_layer=26, grid=(27, 27), has_cls=False)
    budgets = [STCCacher(ratio=ratio).budget(encoder, None) for ratio in (0.25, 0.0, 1.0)]
    assert budgets == [182, 1, 729]
    assert STCCacher().budget(encoder, 60) == 60 and STCCacher(ratio=0.25).budget(encoder, 182) == 182
    assert STCCacher(interval=3).references(7) == [0, 0, 0, 3, 3, 3, 6]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 1.5}, r"stc_cacher: expected ratio in \[0, 1\], got 1.5"),
        ({"interval": 0}, "stc_cacher: expected interval >= 1, got 0"),
        ({"metric": "l3"}, "stc_cacher: expected metric to be one of cosine, l1, l2, dot"),
        ({"ratio": 0.25, "keep": 5}, "stc_cacher: ratio=0.25 is 4 tokens of a frame, got keep=5; give either"),
    ],
)
def test_bad_options(llava, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.apply(llava, "stc_cacher", **options)


def test_what_cannot_work():
    model, batch = tiny.llava(), frames([(2, 4)])
    with zoo.apply(model, "stc_cacher", keep=5):
        with pytest.raises(ValueError, match="stc_cacher: computes some of the queries that fastervlm scores with"):
            zoo.apply(model, "fastervlm", keep=5)
        with pytest.raises(ValueError, match="tome: stage vision_layers of this model is claimed by stc_cacher"):
            zoo.apply(model, "tome", keep=8)
        model.model.vision_tower.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="expected no gradient checkpointing"):
            model.train()(**batch)
        model.model.vision_tower.gradient_checkpointing_disable()
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.dropout = 0.1
        with pytest.raises(ValueError, match="expected no attention dropout in the vision encoder"):
            model(**batch)
