"""Merging inside the vision encoder: schedules; every method against plain loops on CLIP, SigLIP and LLaVA."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch.nn import functional
from transformers import CLIPVisionModel, SiglipVisionModel

from tests.models import tiny
from tests.models.layer_merging import CASES, METHODS, expected, trace
from tests.reference import merging as reference
from vtkernels import energy_scores, zoo
from vtkernels.zoo.embedded import evaluate
from vtkernels.zoo.merging import LayerContext, clamped, geometric, spread
from vtkernels.zoo.methods.tome import numbers
from vtkernels.zoo.recipe import Context, Kept

GRID = 6
PATCHES = GRID * GRID
PROMPTS = [(2, 5), (1, 3), (0, 4), (1, 9)]
VIT_B16 = zoo.Encoder(num_layers=12, feature_layer=11, grid=(14, 14), has_cls=True)

# Schedules.


def test_the_papers_schedule_of_r():
    assert numbers((8, -1), 12) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert numbers((8, 1), 12) == numbers((8, -1), 12)[::-1]
    assert numbers([3, 5], 4) == [3, 5, 0, 0]
    assert clamped([9, 9, 9], 20) == [9, 5, 3]


def left(method: str, encoder: zoo.Encoder, **options) -> int:
    return zoo.make_recipe(method, **options).budget(encoder, None)


def test_the_papers_numbers_of_tokens():
    """Patches left, [CLS] not counted: ViT-B/16 has 197 - 12 * 13 = 41 tokens with it."""
    assert left("tome", VIT_B16, r=13) == 40
    siglip = zoo.Encoder(num_layers=27, feature_layer=25, grid=(54, 54), has_cls=False)
    assert left("tinychart", siglip, r=84) == 732
    assert zoo.make_recipe("tinychart").schedule(siglip, 732) == [84] * 26
    big_g = zoo.Encoder(num_layers=48, feature_layer=46, grid=(27, 27), has_cls=True)
    assert left("auroracap", big_g, ratio=0.4) == 306
    tokens, encoder = 196, VIT_B16
    for _ in range(12):
        tokens -= int(tokens - tokens * 0.9)
    assert left("pitome", encoder, ratio=0.9) == tokens
    # The layers of the released LLaVA patch that merge as ToMe does count [CLS]: a quarter of 40, not of 39.
    clip = zoo.Encoder(num_layers=24, feature_layer=22, grid=(13, 3), has_cls=True)
    assert zoo.make_recipe("pitome", ratio=0.75, released_llava=True).own_schedule(clip)[:2] == [10, 7]
    assert zoo.make_recipe("pitome", ratio=0.75).own_schedule(clip)[:2] == [9, 7]


@pytest.mark.parametrize("plan", [spread, geometric])
def test_a_budget_is_met_exactly_where_halving_allows(plan):
    for tokens in (1, 2, 7, 36, 49):
        for layers in (1, 2, 3, 6):
            for keep in range(-(-tokens // 2**layers), tokens + 1):
                schedule, rest = plan(tokens, keep, layers), tokens
                for r in schedule:
                    assert 0 <= r <= rest // 2
                    rest -= r
                assert rest == keep and len(schedule) == layers


def test_a_budget_is_spread_evenly():
    assert spread(576, 116, 23) == [20] * 23
    assert spread(196, 41, 12) == [13] * 11 + [12]
    assert spread(16, 4, 2) == [8, 4]  # evenly [6, 6] would end at 5


# One layer: the golden examples, tokens 0..5 at these angles.

METRIC = torch.deg2rad(torch.tensor([0.0, 10.0, 90.0, 82.0, 50.0, 200.0]))
METRIC = torch.stack([METRIC.cos(), METRIC.sin()], -1)


def layer(method: str, r: int, prefix: int = 0, metric=METRIC, **options):
    """Rows and sizes of values 1..6 after one layer."""
    values = torch.arange(1.0, len(metric) + 1)[None, :, None]
    context = LayerContext(values, metric[None, None], None, prefix, 0, 12, r)
    merge = zoo.make_recipe(method, **options).vision_layers(context)
    assert merge.owner.shape == (1, len(metric))
    return merge.tokens[0, :, 0].tolist(), merge.size[0].tolist() if merge.size is not None else None


def test_golden_tome():
    assert layer("tome", 2) == ([5, 1.5, 3.5, 6], [1, 2, 2, 1])
    assert layer("tome", 3) == ([1.5, 4, 6], [2, 3, 1])
    assert layer("tome", 2, prefix=1) == ([1, 2, 4, 6], [1, 1, 3, 1])
    assert layer("simvlg", 2, prefix=1) == ([1, 2, 4, 6], None)


def test_golden_pitome():
    energies = energy_scores(METRIC[None], margin=0.9)[0]
    torch.testing.assert_close(
        energies, torch.tensor([-0.3349, -0.2919, -0.2927, -0.2642, -0.2095, -0.6459]), atol=5e-5, rtol=0
    )
    assert layer("pitome", 1) == ([2, 3, 1, 6, 4.5], [1, 1, 1, 1, 2])
    assert layer("pitome", 2) == ([1, 6, pytest.approx(11 / 3), 3], [1, 1, 3, 1])
    front = torch.cat([torch.tensor([[-1.0, 0.0]]), METRIC])  # [CLS] takes no part
    assert layer("pitome", 1, prefix=1, metric=front)[0] == [1, 3, 4, 2, 7, 5.5]


def test_prefix_tokens_stay_in_front():
    draw = torch.Generator().manual_seed(0)
    for prefix in (1, 2, 5):
        values, metric = torch.randn(2, 16, 3, generator=draw), torch.randn(2, 1, 16, 4, generator=draw)
        for method in ("tome", "pitome"):
            merge = zoo.make_recipe(method).vision_layers(LayerContext(values, metric, None, prefix, 0, 12, 4))
            assert torch.equal(merge.tokens[:, :prefix], values[:, :prefix])
            assert merge.owner[:, :prefix].tolist() == [list(range(prefix))] * 2


# Proportional attention.


def test_golden_proportional_attention():
    query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 2, 4)
    value = torch.eye(2).expand(1, 2, 2, 2)
    bias = zoo.size_bias(torch.tensor([[1, 3]]))
    weights = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75]).expand(1, 2, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_key_weighs_like_its_copies(dtype):
    draw = torch.Generator().manual_seed(1)
    size = torch.tensor([[1, 4, 2, 1], [3, 1, 1, 5]])
    valid = torch.tensor([[True, True, True, False], [True, True, True, True]])
    query, key, value = (torch.randn(2, 3, n, 8, generator=draw, dtype=torch.float64) for n in (5, 4, 4))
    merged = functional.scaled_dot_product_attention(
        *(t.to(dtype) for t in (query, key, value)), attn_mask=zoo.size_bias(size, valid=valid, dtype=dtype)
    )
    for item in range(2):
        copies = torch.repeat_interleave(torch.arange(4), size[item] * valid[item])
        whole = functional.scaled_dot_product_attention(query[item], key[item, :, copies], value[item, :, copies])
        tolerance = 1e-6 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(merged[item].double(), whole, atol=tolerance, rtol=tolerance)


# Towers of transformers, alone.


def tower(kind: str, seed: int, layers: int):
    config = tiny.llava(seed, tower=kind, grid=GRID, vision_layers=layers).config.vision_config
    model = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[kind](config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def pictures(images: int, seed: int = 0):
    side = tiny.PATCH * GRID
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed))


def tower_input(model, pixels):
    x = model.embeddings(pixels)
    return model.pre_layrnorm(x) if hasattr(model, "pre_layrnorm") else x


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("case", CASES)
def test_a_tower_is_the_reference(case, kind):
    model, pixels = tower(kind, 1, 4), pictures(2, seed=2)
    exact, prefix = copy.deepcopy(model).double(), int(kind == "clip")
    with zoo.apply(model, case.split("-")[0], keep=7, **CASES[case]) as handle:
        rows = model(pixels).last_hidden_state
        assert model.config._attn_implementation == "sdpa"
        schedule = handle.recipe.schedule(zoo.Encoder(4, 3, (GRID, GRID), kind == "clip"), 7)
    start, layers = tower_input(exact, pixels.double()), reference.transformers_layers(exact)
    for image in range(2):
        tokens = expected(case, layers, start[image], schedule, 4, prefix)
        assert handle.last.owner[image].tolist() == reference.owner_map(tokens, prefix + PATCHES)
        wanted = torch.stack([token.x for token in tokens])
        wanted = exact.post_layernorm(wanted) if kind == "siglip" else wanted
        torch.testing.assert_close(rows[image].double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_tower_refuses_what_it_cannot_follow():
    model = tower("clip", 0, 2)
    with zoo.apply(model, "tome", keep=20):
        model.set_attn_implementation("flex_attention")
        with pytest.raises(ValueError, match="proportional attention needs attn_implementation sdpa or eager"):
            model(pictures(1))
        model.set_attn_implementation("sdpa")
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="expected no gradient checkpointing"):
            model.train()(pictures(1))


# LLaVA.


@pytest.fixture(scope="module", params=["clip", "siglip"])
def llava(request):
    return tiny.llava(1, tower=request.param, grid=GRID, vision_layers=5)


def new_tokens(model, batch):
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    return out[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_llava_gets_the_references_rows(llava, case):
    """Of the feature layer, layer 3 of 5: the layers after it merge nothing."""
    batch = tiny.inputs(PROMPTS, grid=GRID, seed=3)
    clip = llava.config.vision_config.model_type == "clip_vision_model"
    seen = []
    watch = llava.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with zoo.apply(llava, case.split("-")[0], keep=5, **CASES[case]) as handle:
        logits = llava(**batch).logits
        schedule = handle.recipe.schedule(zoo.Encoder(5, 3, (GRID, GRID), clip), 5)
    watch.remove()
    exact = copy.deepcopy(llava.model.vision_tower).double()
    start, layers = tower_input(exact, batch["pixel_values"].double()), reference.transformers_layers(exact)
    place = [0, 5, 0, 0]  # of each image's first token among its prompt's
    for image in range(4):
        tokens = expected(case, layers, start[image], schedule, 5, int(clip))[int(clip) :]
        owner = (
            reference.owner_map(tokens, PATCHES)
            if not clip
            else reference.owner_map(
                [replace(token, members=frozenset(m - 1 for m in token.members)) for token in tokens], PATCHES
            )
        )
        assert handle.last.owner[image].tolist() == [place[image] + row for row in owner]
        wanted = torch.stack([token.x for token in tokens])
        torch.testing.assert_close(seen[0][image].double(), wanted, rtol=1e-4, atol=1e-4)
    last = handle.last
    assert last.counts == [5] * 4 and last.indices is None and logits.shape[1] == last.input_ids.shape[1]
    assert last.tokens_after == [1 + words + 5 * images for images, words in PROMPTS]


@pytest.mark.parametrize("method", METHODS)
def test_llava_keep_all_and_detach_are_the_untouched_model(llava, method):
    batch = tiny.inputs(PROMPTS, grid=GRID)
    with torch.no_grad():
        before = llava(**batch).logits, new_tokens(llava, batch)
        attributes = trace(llava)
        for keep in ("all", PATCHES):
            with zoo.apply(llava, method, keep=keep) as handle:
                assert torch.equal(llava(**batch).logits, before[0])
                assert torch.equal(new_tokens(llava, batch), before[1])
            assert handle.last.indices.tolist() == [list(range(PATCHES))] * 4
        with zoo.apply(llava, method, keep=5):
            assert llava(**batch).logits.shape != before[0].shape
            features = llava.model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True)
            assert len(features.pooler_output[0]) == PATCHES  # outside a call, the tower merges nothing
        after = trace(llava)
        for name, values in attributes.items():
            assert values.keys() == after[name].keys()
            assert all(value is after[name][key] or value == after[name][key] for key, value in values.items()), name
        assert torch.equal(llava(**batch).logits, before[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_llava_batch_generates_what_its_rows_generate_alone(llava, method, side):
    batch = tiny.inputs(PROMPTS, grid=GRID, side=side)
    with zoo.apply(llava, method, keep=5) as handle:
        together, owner, alone = new_tokens(llava, batch), handle.last.owner, []
        for index, (images, _) in enumerate(PROMPTS):
            alone.append(new_tokens(llava, tiny.row(batch, PROMPTS, index)))
            if images:
                first = sum(count for count, _ in PROMPTS[:index])
                assert torch.equal(handle.last.owner, owner[first : first + images])
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("method", METHODS)
def test_llava_gradient_and_bfloat16(method):
    model, batch = tiny.llava(grid=4), tiny.inputs([(1, 6), (2, 4)])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == tiny.IMAGE, -100)
    with zoo.apply(model, method, keep=5):
        model(**batch, labels=labels).loss.backward()
    gradient = model.model.vision_tower.get_parameter("embeddings.patch_embedding.weight").grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with zoo.apply(model.bfloat16(), method, keep=5) as handle:
        assert new_tokens(model, batch).shape == (2, 4)
    assert handle.last.counts == [5] * 3 and (handle.last.owner >= 0).all()


@dataclass(frozen=True)
class Both(zoo.Recipe):
    """Needs tokens that are patches."""

    name: ClassVar[str] = "both"

    def after_projector(self, ctx: Context) -> Kept:
        raise AssertionError("never reached")


@dataclass(frozen=True)
class Loose(zoo.Recipe):
    name: ClassVar[str] = "loose"

    def vision_layers(self, ctx):
        raise AssertionError("never reached")


@pytest.mark.parametrize(
    "method, options, error, message",
    [
        (
            "tome",
            {"keep": 4},
            ValueError,
            "tome: expected keep >= 5, what 3 layers leave of 36 tokens when each merges",
        ),
        ("tome", {"r": -1}, ValueError, "tome: expected r >= 0, whole numbers of tokens, got -1"),
        ("tome", {"r": 2.5}, ValueError, "tome: expected r >= 0, whole numbers"),
        ("tome", {"r": (8, 2)}, ValueError, r"tome: expected r as \(r, inflect\) with inflect in \[-1, 1\]"),
        ("tome", {"r": [1] * 5}, ValueError, "tome: expected r for at most 4 layers, got 5"),
        ("tome", {"r": 3, "keep": 20}, ValueError, "tome: the options leave 27 tokens an image, got keep=20"),
        ("tome", {"order": "random", "keep": 9}, ValueError, "tome: expected order to be one of position, method"),
        ("pitome", {"ratio": 0.4}, ValueError, r"pitome: expected ratio in \[0.5, 1\], got 0.4"),
        (
            "pitome",
            {"keep": 9, "released_llava": True, "energy_bsm": True},
            ValueError,
            "released_llava without energy",
        ),
        ("auroracap", {"ratio": 0.0}, ValueError, r"auroracap: expected ratio in \(0, 1\], got 0.0"),
        ("simvlg", {"r": -2}, ValueError, "simvlg: expected r >= 0, got -2"),
        (Loose(), {"keep": 9}, TypeError, "loose: expected a LayerMerging or a LayerReuse for the stage"),
    ],
)
def test_bad_arguments(method, options, error, message):
    model = tiny.llava(grid=GRID, vision_layers=4)
    before = trace(model)
    with pytest.raises(error, match=message):
        zoo.apply(model, method, **options)
    assert trace(model).keys() == before.keys() and "forward" not in model.__dict__


def test_what_cannot_be_combined():
    model, batch = tiny.llava(grid=GRID), tiny.inputs([(1, 4)], grid=GRID)
    with zoo.apply(model, "tome", keep=12), zoo.apply(model, Both(), keep=5):
        with pytest.raises(ValueError, match="both: expected one patch a token"):
            model(**batch)
        with pytest.raises(ValueError, match="pitome: stage vision_layers of this model is claimed by tome"):
            zoo.apply(model, "pitome", keep=12)
    several = tiny.llava(grid=GRID, vision_feature_layer=[-2, -1])
    with pytest.raises(ValueError, match="tome: expected one vision_feature_layer"):
        zoo.apply(several, "tome", keep=12)


def test_evaluation_leaves_out_budgets_that_cannot_be_met():
    model = tiny.llava(vision_layers=4)  # three layers halve 16 tokens to 2
    variants = evaluate._variants(model, ["tome"], [0.5, 0.1, 0.05], [])
    assert [(name, keep) for name, keep, _ in variants if name == "tome"] == [("tome", 0.5), ("tome", 0.1)]
    assert "forward" not in model.__dict__
