"""Merging inside timm's ViTs: every method against plain loops, the papers' numbers of tokens, attach and detach."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from tests.models import vit
from tests.models.layer_merging import CASES, METHODS, expected, trace
from tests.reference import merging as reference
from vtkernels import zoo


def timm_input(model, pixels):
    """What the first block gets, in float64."""
    seen = []
    watch = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(pixels)
    watch.remove()
    return seen[0]


KINDS = {
    "class": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 4, "init_values": 0.5, "qkv_bias": False},
    "bare": {"class_token": False, "global_pool": "avg"},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_timm_is_the_reference(case, kind):
    model, pixels = vit.vit(seed=3, grid=5, **KINDS[kind]), vit.pictures(2, grid=5, seed=4)
    exact, prefix = copy.deepcopy(model).double(), model.num_prefix_tokens
    seen = {}
    watch = model.blocks[-1].register_forward_hook(lambda module, args, output: seen.update(last=output))
    with zoo.apply(model, case.split("-")[0], keep=9, **CASES[case]) as handle:
        logits = model(pixels)
        schedule = handle.recipe.schedule(zoo.Encoder(4, 3, (5, 5), model.has_class_token), 9)
    watch.remove()
    start, layers = timm_input(exact, pixels.double()), reference.timm_layers(exact)
    for image in range(2):
        tokens = expected(case, layers, start[image], schedule, len(layers), prefix)
        assert handle.last.owner[image].tolist() == reference.owner_map(tokens, prefix + 25)
        rows = torch.stack([token.x for token in tokens])
        torch.testing.assert_close(seen["last"][image].double(), rows, rtol=1e-4, atol=1e-4)
        if handle.last.size is not None:
            assert handle.last.size[image].tolist() == [token.size for token in tokens]
        head = exact.norm(rows)
        if kind == "bare":
            size = torch.tensor([token.size for token in tokens])[:, None]
            head = exact.fc_norm((rows * size).sum(0, keepdim=True) / size.sum())
        wanted = exact.head(head[0])
        wanted = (wanted + exact.head_dist(head[1])) / 2 if kind == "distilled" else wanted
        torch.testing.assert_close(logits[image].double(), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_vit_b16_schedule_of_token_counts():
    """197 tokens and r = 13, as in the paper: 13 fewer after every layer."""
    model, counts = vit.vit(grid=14, depth=12), []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, output: counts.append(output.shape[1]))
    with zoo.apply(model, "tome", r=13) as handle:
        model(vit.pictures(1, grid=14))
    assert counts == [197 - 13 * (layer + 1) for layer in range(12)] and counts[-1] == 41
    assert handle.keep == 40 and handle.last.owner.shape == (1, 197) and handle.last.size.sum() == 197
    counts.clear()
    with zoo.apply(model, "tome", r=(8, -1)):
        model(vit.pictures(1, grid=14))
    assert counts == [181, 167, 154, 143, 133, 125, 118, 113, 109, 107, 106, 106]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_timm_r_0_and_detach_are_the_untouched_model(method):
    model, pixels = vit.vit(), vit.pictures(2)
    before, attributes = model(pixels), trace(model)
    nothing = {"ratio": 1.0} if method in ("pitome", "auroracap") else {"r": 0}
    with zoo.apply(model, method, **nothing) as handle:
        assert torch.equal(model(pixels), before) and handle.keep == 36
    with zoo.apply(model, method, keep=9):
        assert not torch.equal(model(pixels), before)
    after = trace(model)
    assert after.keys() == attributes.keys()
    for name, values in attributes.items():
        assert values.keys() == after[name].keys()
        assert all(value is after[name][key] or value == after[name][key] for key, value in values.items()), name
    assert torch.equal(model(pixels), before)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_timm_batch_is_each_row_alone(method):
    model, pixels = vit.vit(seed=5), vit.pictures(3, seed=6)
    with zoo.apply(model, method, keep=9) as handle:
        together, owner = model(pixels), handle.last.owner
        again = model(pixels)
        for image in range(3):
            torch.testing.assert_close(model(pixels[image : image + 1])[0], together[image])
            assert torch.equal(handle.last.owner[0], owner[image])
    assert torch.equal(together, again)


@torch.no_grad()
def test_timm_compiles_without_a_break():
    model, pixels = vit.vit(seed=3, depth=2), vit.pictures(2)
    with zoo.apply(model, "tome", keep=9) as handle:
        logits, owner = model(pixels), handle.last.owner
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(pixels), logits)
        assert torch.equal(handle.last.owner, owner)


@pytest.mark.parametrize("method", METHODS)
def test_timm_gradient_is_the_references(method):
    model, pixels, label = vit.vit(seed=7, grid=5), vit.pictures(1, grid=5, seed=8), torch.tensor([2])
    exact = copy.deepcopy(model).double()
    with zoo.apply(model, method, keep=9) as handle:
        functional.cross_entropy(model(pixels), label).backward()
        schedule = handle.recipe.schedule(zoo.Encoder(4, 3, (5, 5), True), 9)
    start = timm_input(exact, pixels.double())
    tokens = expected(method, reference.timm_layers(exact), start[0], schedule, 4, 1)
    functional.cross_entropy(exact.head(exact.norm(tokens[0].x))[None], label).backward()
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.2.mlp.fc1.weight"):
        wanted = exact.get_parameter(name).grad
        torch.testing.assert_close(model.get_parameter(name).grad.double(), wanted, rtol=1e-3, atol=1e-4)
        assert wanted.abs().max() > 1e-2


@torch.no_grad()
def test_timm_pooling_weighs_by_size():
    for kind, options in {"avgmax": {}, "max": {}, "map": {}, "avg": {"pool_include_prefix": True}}.items():
        model, pixels = vit.vit(global_pool=kind, **options), vit.pictures(1)
        seen = []
        watch = model.norm.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        with zoo.apply(model, "tome", keep=9) as handle:
            logits = model(pixels)
        watch.remove()
        start = 0 if options else 1
        rows = seen[0][0, start:].repeat_interleave(handle.last.size[0, start:].long(), dim=0)[None]
        if kind == "map":
            pooled = model.attn_pool(rows)
        else:
            mean, most = rows.mean(1), rows.amax(1)
            pooled = {"avg": mean, "max": most, "avgmax": 0.5 * (mean + most)}[kind]
        torch.testing.assert_close(logits, model.head(model.fc_norm(pooled)))


def test_timm_bad_input():
    with pytest.raises(NotImplementedError, match="stage vision_encoder is not served for VisionTransformer"):
        zoo.apply(vit.vit(), "fastervlm", keep=9)
    model = vit.vit(dynamic_img_size=True)
    with zoo.apply(model, "tome", r=2):
        with pytest.raises(ValueError, match=r"tome: expected 36 patches \(6 x 6\) behind 1 other tokens, got 17"):
            model(vit.pictures(1, grid=4))
        with pytest.raises(ValueError, match="expected no attn_mask"):
            model(vit.pictures(1), attn_mask=torch.ones(1, 1, 37, 37, dtype=torch.bool))
        model.set_grad_checkpointing()
        with pytest.raises(ValueError, match="expected no gradient checkpointing"):
            model(vit.pictures(1))
    with pytest.raises(ValueError, match=r"expected blocks of class timm.*Block, got .*ParallelScaling"):
        from timm.models.vision_transformer import ParallelScalingBlock

        zoo.apply(vit.vit(block_fn=ParallelScalingBlock), "tome", r=2)
