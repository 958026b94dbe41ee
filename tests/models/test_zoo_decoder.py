"""Tokens that leave between the language model's layers, against a plain model without a cache."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

from tests.models import tiny
from tests.models.layer_merging import trace
from tests.reference import decoder as reference
from tests.reference.recipes import top
from vtkernels import attention, prune_gather, zoo
from vtkernels.zoo.decoder import DecoderContext
from vtkernels.zoo.recipe import Kept

GRID = 4
N = GRID * GRID
PROMPTS = [(1, 4), (2, 9), (0, 5), (1, 7)]
LAYERS = 4
NEW = 4
IMPLEMENTATIONS = ["sdpa", "vtk"]
attention.register()


@dataclass(frozen=True)
class Stairs(zoo.Recipe):
    """Half of the visual tokens stay before layer 1, a quarter of those before layer 2, none before layer 3."""

    name: ClassVar[str] = "stairs"

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        return (1, 2, 3)

    def between_layers(self, ctx: DecoderContext) -> Kept:
        share = {1: 0.5, 2: 0.25, 3: 0.0}[ctx.layer]
        assert ctx.num_layers == LAYERS and ctx.keep == N
        count = int(ctx.tokens.shape[1] * share)
        assert ctx.layer > 1 or count == ctx.num_images * N // 2
        return prune_gather(ctx.tokens, ctx.attention(), count)


def stair(share: float):
    def rule(states, scores):
        kept = sorted(top(scores, int(len(scores) * share)))
        return states[kept], kept

    return rule


CASES = {
    "holitom": ("holitom", {}, {3: reference.holitom_inner(0.5, "sequential")}),
    "holitom-mean": (
        "holitom",
        {"inner": 0.7, "inner_layer": 1, "fold": "mean"},
        {1: reference.holitom_inner(0.7, "mean")},
    ),
    "stairs": (Stairs(), {}, {1: stair(0.5), 2: stair(0.25), 3: stair(0.0)}),
}


@pytest.fixture(scope="module")
def model():
    return tiny.llava(text_layers=LAYERS)


@pytest.fixture(scope="module")
def exact(model):
    twin = copy.deepcopy(model).double()
    return SimpleNamespace(model=twin.model.language_model, lm_head=twin.lm_head)


def embeddings(model, batch):
    """What the language model gets of each prompt, float64 without padding, and where the visual tokens are."""
    seen = []
    watch = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    watch.remove()
    rows = zip(seen[0], batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [(x[real].double(), (ids[real] == tiny.IMAGE).nonzero()[:, 0].tolist()) for x, ids, real in rows]


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_references(model, exact, case, side, implementation):
    method, options, rules = CASES[case]
    batch = tiny.inputs(PROMPTS, side=side)
    inputs = embeddings(model, batch)
    model.set_attn_implementation({"text_config": implementation})
    with zoo.apply(model, method, keep=N, **options) as handle:
        out = model(**batch)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    assert sorted(handle.last.decoder) == sorted(rules)
    for row, (embeds, visual) in enumerate(inputs):
        logits, left = reference.run(exact, embeds, visual, len(embeds) - 1, rules)
        ours = out.logits[row, batch["attention_mask"][row].bool()].double()
        assert len(logits) < len(embeds) or not visual
        torch.testing.assert_close(ours[list(logits)], torch.stack(list(logits.values())), rtol=1e-3, atol=1e-3)
        for stop, numbers in left.items():
            assert handle.last.decoder[stop][row].tolist() == numbers
    # Layers before a stop hold the whole prompt, those after it what is left of the longest one.
    lengths = [out.past_key_values.get_seq_length(layer) for layer in range(LAYERS)]
    words = [int(mask.sum()) - N * images for mask, (images, _) in zip(batch["attention_mask"], PROMPTS, strict=True)]
    for layer in range(LAYERS):
        stops = [stop for stop in rules if stop <= layer]
        left = [len(part) for part in handle.last.decoder[max(stops)]] if stops else None
        expected = max(a + b for a, b in zip(words, left, strict=True)) if stops else batch["input_ids"].shape[1]
        assert lengths[layer] == expected


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [slice(1), slice(3)], ids=["batch1", "batch3"])
@pytest.mark.parametrize("case", CASES)
def test_decoding_is_the_references(model, exact, case, rows, implementation):
    method, options, rules = CASES[case]
    prompts = PROMPTS[rows]
    batch = tiny.inputs(prompts)
    inputs = embeddings(model, batch)
    model.set_attn_implementation({"text_config": implementation})
    with zoo.apply(model, method, keep=N, **options):
        out = model.generate(
            **batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    table = exact.model.get_input_embeddings().weight
    for row, (embeds, visual) in enumerate(inputs):
        last = len(embeds) - 1
        for step in range(NEW):
            logits, _ = reference.run(exact, embeds, visual, last, rules)
            torch.testing.assert_close(out.logits[step][row].double(), logits[last + step], rtol=1e-3, atol=1e-3)
            token = int(logits[last + step].argmax())
            assert token == int(out.sequences[row, batch["input_ids"].shape[1] + step])
            embeds = torch.cat([embeds, table[token][None]])


@torch.no_grad()
@pytest.mark.parametrize("keep", [5, N])
def test_every_way_to_decode_agrees(model, keep, monkeypatch):
    model.set_attn_implementation("sdpa")
    batch, alone = tiny.inputs(PROMPTS), tiny.inputs([(2, 6)])
    with zoo.apply(model, "holitom", keep=keep) as handle:
        expected, single = tiny.new_tokens(model, batch, 8), tiny.new_tokens(model, alone, 8)
        assert torch.equal(new_tokens(model, batch, use_cache=False), expected)
        # Rejected proposals are cropped off layers of different length.
        words = torch.cat([single, alone["input_ids"]], 1)
        repeating = {**alone, "input_ids": alone["input_ids"].clone()}
        repeating["input_ids"][0, -3:] = words[0, :3]
        plain = new_tokens(model, repeating)
        crop, cropped = DynamicCache.crop, []
        monkeypatch.setattr(DynamicCache, "crop", lambda cache, count: (cropped.append(count), crop(cache, count)))
        assert torch.equal(new_tokens(model, repeating, prompt_lookup_num_tokens=3), plain)
        assert min(cropped) < 0
        # One beam of a row is the row; several are those of the row alone.
        beams = model.generate(**batch, num_beams=3, num_return_sequences=2, max_new_tokens=4, do_sample=False)
        for row in range(len(PROMPTS)):
            part = tiny.row(batch, PROMPTS, row)
            own = model.generate(**part, num_beams=3, num_return_sequences=2, max_new_tokens=4, do_sample=False)
            assert torch.equal(beams[2 * row : 2 * row + 2, -4:], own[:, -4:])
        # By hand, from forward's cache.
        out = model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), use_cache=True)
        mask, tokens = handle.last.attention_mask, []
        for step in range(8):
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = torch.tensor(handle.last.tokens_after).unsqueeze(1) + step
            out = model(tokens[-1], attention_mask=mask, position_ids=positions, past_key_values=out.past_key_values)
        assert torch.equal(torch.cat(tokens, 1), expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_read_from_the_pass_before(model, monkeypatch, side):
    """On "vtk", whose log-sum-exp of the last token's row covers its prompt alone, in every layer's padding."""
    batch, seen = tiny.inputs(PROMPTS, side=side), []
    attention = DecoderContext.attention

    def watched(ctx):
        scores = attention(ctx)
        torch.testing.assert_close(scores, attention(replace(ctx, lse=None)), rtol=1e-5, atol=1e-8)
        logits = (
            ctx.query[0, :, -1:].double() @ ctx.key[0].repeat_interleave(2, 0).double().mT * ctx.key.shape[-1] ** -0.5
        )
        torch.testing.assert_close(scores[0].double(), logits.softmax(-1).mean(0)[0, ctx.visual], rtol=1e-4, atol=1e-7)
        seen.append((ctx.layer, ctx.query, ctx.key, ctx.lse))
        return scores

    monkeypatch.setattr(DecoderContext, "attention", watched)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation({"text_config": implementation})
        with zoo.apply(model, Stairs(), keep=N):
            model(**batch)
    plain, recorded = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for (layer, query, key, lse), (again, *ours) in zip(plain, recorded, strict=True):
        assert layer == again and lse is None and ours[2] is not None
        torch.testing.assert_close((query, key), tuple(ours[:2]), rtol=1e-4, atol=1e-5)


def new_tokens(model, batch, **settings):
    out = model.generate(**batch, max_new_tokens=8, do_sample=False, **settings)
    return out[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
def test_prompts_of_one_length_that_keep_different_numbers(model):
    """No padding in the prompt, and padding behind the stop."""
    batch = tiny.inputs([(2, 3), (1, 3 + N)])
    assert batch.pop("attention_mask").all()
    with zoo.apply(model, "holitom", keep=N):
        together = tiny.new_tokens(model, batch)
        for row, images in enumerate((slice(0, 2), slice(2, 3))):
            alone = {"input_ids": batch["input_ids"][row : row + 1], "pixel_values": batch["pixel_values"][images]}
            assert torch.equal(tiny.new_tokens(model, alone), together[row : row + 1])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [slice(1), slice(3)], ids=["batch1", "batch3"])
@pytest.mark.parametrize("keep, options", [("all", {}), (N, {"inner": 0})])
def test_keep_all_and_detach_are_the_untouched_model(model, keep, options, rows, side):
    batch = tiny.inputs(PROMPTS[rows], side=side)
    before = model(**batch).logits, tiny.new_tokens(model, batch)
    attributes = trace(model)
    with zoo.apply(model, "holitom", keep=keep, **options):
        assert torch.equal(model(**batch).logits, before[0]) and torch.equal(tiny.new_tokens(model, batch), before[1])
    with zoo.apply(model, "holitom", keep=N):
        assert not torch.equal(model(**batch).logits, before[0])
        text = {"input_ids": batch["input_ids"][:, -4:]}
        with_stage = model(**text).logits
    after = trace(model)
    for name, values in attributes.items():
        assert values.keys() == after[name].keys()
        assert all(value is after[name][key] or value == after[name][key] for key, value in values.items()), name
    assert torch.equal(model(**batch).logits, before[0]) and torch.equal(model(**text).logits, with_stage)


def test_the_gradient_is_the_references(model, exact):
    """Of the kept and of the folded tokens; labels meet the logits of their own tokens."""
    batch = tiny.inputs([(1, 4), (2, 6)])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == tiny.IMAGE, -100)
    labels = labels.masked_fill((batch["attention_mask"] == 0) | (labels == 1), -100)  # nothing predicts the first
    weight = model.model.multi_modal_projector.linear_2.weight
    with zoo.apply(model, "holitom", keep=N):
        loss = model(**batch, labels=labels).loss
        (gradient,) = torch.autograd.grad(loss, weight)
    total, count = torch.zeros(()).double(), 0
    for row, (embeds, visual) in enumerate(differentiable(model, batch)):
        logits, _ = reference.run(exact, embeds, visual, len(embeds) - 1, CASES["holitom"][2])
        wanted = labels[row][batch["attention_mask"][row].bool()].tolist()
        for place in range(len(embeds) - 1):
            if wanted[place + 1] != -100:  # after an image, the last of its tokens that is left predicts
                before = max(left for left in logits if left <= place)
                total = total - logits[before].log_softmax(-1)[wanted[place + 1]]
                count += 1
    (expected,) = torch.autograd.grad(total / count, weight)
    torch.testing.assert_close(loss.double(), total / count, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def differentiable(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"])
    features = torch.cat(list(model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output))
    is_image = batch["input_ids"] == tiny.IMAGE
    embeds = embeds.masked_scatter(is_image.unsqueeze(-1), features).double()
    rows = zip(embeds, batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [(x[real], (ids[real] == tiny.IMAGE).nonzero()[:, 0].tolist()) for x, ids, real in rows]


def test_default_layer():
    """Layer 18 of Qwen2-7B's 28."""
    recipe = zoo.make_recipe("holitom")
    assert [recipe.decoder_layers(layers) for layers in (28, 32, 24, 3, 2)] == [(18,), (21,), (15,), (2,), (1,)]
    assert zoo.make_recipe("holitom", inner=0).decoder_layers(28) == ()
    assert zoo.make_recipe("holitom", inner_layer=3).decoder_layers(28) == (3,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"inner": 1.0}, r"holitom: expected inner in \[0, 1\), got 1.0"),
        ({"fold": "sum"}, "holitom: expected fold to be one of sequential, mean"),
        ({"inner_layer": 0}, r"holitom: expected a decoder layer in \[1, 3\], got 0"),
        ({"inner_layer": LAYERS}, r"holitom: expected a decoder layer in \[1, 3\], got 4"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.apply(model, "holitom", keep=5, **options)
    assert "forward" not in model.__dict__ and "forward" not in model.model.language_model.__dict__


def test_what_cannot_work():
    model, batch = tiny.llava(), tiny.inputs([(1, 4)])
    with zoo.apply(model, "holitom", keep=5):
        with pytest.raises(ValueError, match="holitom: expected a cache that grows, got StaticCache"):
            model.generate(**batch, max_new_tokens=2, cache_implementation="static", disable_compile=True)
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="holitom: expected no gradient checkpointing"):
            model.train()(**batch)
    model.gradient_checkpointing_disable()
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="expected a language model of type llama, mistral, qwen2 without sliding"):
        zoo.apply(model, "holitom", keep=5)


@torch.no_grad()
def test_a_cache_of_the_callers_own(model):
    batch, cache = tiny.inputs([(1, 4)]), DynamicCache()
    with zoo.apply(model, "holitom", keep=N):
        expected = tiny.new_tokens(model, batch)
        assert torch.equal(tiny.new_tokens(model, {**batch, "past_key_values": cache}), expected)
        assert cache.get_seq_length(0) - cache.get_seq_length(LAYERS - 1) == N // 2
