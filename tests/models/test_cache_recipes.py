"""The cache's methods: what attention reads against the plain formulas, beside other stages, in a batch."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny
from tests.models.layer_merging import trace
from tests.reference import cache_recipes as reference
from vtkernels import attention, zoo
from vtkernels.cache import PackedKVCache
from vtkernels.zoo import embedded
from vtkernels.zoo.embedded import evaluate
from vtkernels.zoo.embedded.model import BOS, IMAGE_TOKEN, PAD, processor
from vtkernels.zoo.methods.vidkv import VidKV

attention.register()
METHODS = [method.name for method in zoo.methods() if method.stages == ("cache",)]
LAYERS = 3


@pytest.fixture(scope="module")
def model():
    model, _ = embedded.load()
    model.set_attn_implementation({"text_config": "vtk"})
    return model


@pytest.fixture(scope="module")
def inputs():
    """Three questions, two of them padded."""
    pictures, asked = evaluate.drawn(1, video=False, seed=5)
    return evaluate.ask(processor(), pictures * 3, [asked[i].text for i in (0, 1, -1)])


@pytest.fixture(scope="module")
def prompt(model, inputs):
    """What the model makes of the prompts: keys and values of each layer, and attention of the eager kind."""
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        model.set_attn_implementation({"text_config": "eager"})
        attention = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation({"text_config": "vtk"})
    return [(layer.keys.double(), layer.values.double()) for layer in cache.layers], attention


def filled(model, inputs, method, **options):
    """The cache after the prompt."""
    with zoo.apply(model, method, **options), torch.no_grad():
        return model(**inputs).past_key_values


def real(inputs):
    return [row.nonzero()[:, 0].tolist() for row in inputs["attention_mask"]]


def close(ours, expected):
    """But for rounding to float16, and the few codes that it turns."""
    for x, y in zip(ours, expected, strict=True):
        wrong = (x.double() - y).abs() > 2e-3 * y.abs().amax((-2, -1), keepdim=True)
        assert wrong.double().mean() < 0.01


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi(model, inputs, prompt, bits):
    cache = filled(model, inputs, "kivi", bits=bits, residual=100)
    for layer, (keys, values) in zip(cache.layers, prompt[0], strict=True):
        assert layer.pages.tokens == 128
        ours = layer.stored.unpack()
        for row in range(3):
            close((x[row] for x in ours), reference.kivi(keys[row], values[row], bits, 32, 100))


@torch.no_grad()
@pytest.mark.parametrize("protect", [0.0, 0.2, 0.5])
def test_vidkv(model, inputs, prompt, protect):
    cache = filled(model, inputs, "vidkv", protect=protect)
    ids = inputs["input_ids"]
    visual = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output)).view(3, 256, -1)
    embed = model.get_input_embeddings()
    marks = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(3):
        words = [i for i in ids[row].tolist() if i not in (IMAGE_TOKEN, PAD, BOS)]
        chosen = reference.about_the_question(visual[row].double(), embed(torch.tensor(words)).double(), protect)
        (places,) = (ids[row] == IMAGE_TOKEN).nonzero(as_tuple=True)
        marks[row, places[chosen if protect else []]] = True
    ordinary, protected = reference.pages(marks)
    assert len(protected[0]) == (128 if protect == 0.5 else 0)
    for layer, (keys, values) in zip(cache.layers, prompt[0], strict=True):
        assert layer.pages.tokens == len(ordinary[0]) > 0
        ours = layer.stored.unpack()
        for row in range(3):
            expected = reference.vidkv(keys[row], values[row], 32, ordinary[row], protected[row])
            close((x[row] for x in ours), expected)


def test_zipvl(model, inputs, prompt):
    recipe = zoo.make_recipe("zipvl", tau=0.9, recent=20, random=30, seed=3)
    cache = filled(model, inputs, recipe)
    for index, layer in enumerate(cache.layers):
        marks = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
        for row, places in enumerate(real(inputs)):
            before = len(places) - 20
            drawn = torch.randperm(before, generator=torch.Generator().manual_seed(3))[:30].tolist()
            attention = prompt[1][index][row][:, places][:, :, places]
            chosen = reference.zipvl_important(attention, 0.9, drawn + list(range(before, len(places))))
            marks[row, [places[i] for i in chosen]] = True
        residual = layer.stored.places[2].long()
        assert torch.equal(marks.gather(1, residual), layer.stored.marks)
        ordinary, protected = reference.pages(marks)
        assert (layer.pages.tokens, len(ordinary[0])) == (len(ordinary[0]), layer.pages.tokens)
        ours, (keys, values) = layer.stored.unpack(), prompt[0][index]
        for row in range(3):
            close((x[row] for x in ours), reference.zipvl(keys[row], values[row], 32, ordinary[row], protected[row]))


@pytest.mark.parametrize("mode, prior", [("pivotal", True), ("averaged", False), ("weighted", True)])
def test_lookm(model, inputs, prompt, mode, prior):
    cache = filled(model, inputs, "lookm", mode=mode, text_prior=prior)
    index, row = LAYERS - 1, 0
    layer, places = cache.layers[index], real(inputs)[row]
    visual = (inputs["input_ids"][row, places] == IMAGE_TOKEN).tolist()
    attention = prompt[1][index][row].unflatten(0, (2, 2)).sum(1)[:, places][:, :, places]
    kept = reference.lookm_kept(attention, visual, 0.1, 0.1, prior)
    expected = reference.lookm(*(x[row][:, places] for x in prompt[0][index]), kept, mode, True)
    count = len(kept[0])
    assert count <= len(places) * 0.2 and layer.get_seq_length() == inputs["input_ids"].shape[1]
    assert layer.keys.shape[2] == layer.stored.places[2].shape[1] >= count
    for x, y in zip((layer.keys, layer.values), expected, strict=True):
        torch.testing.assert_close(x[row, :, -count:].double(), y, rtol=1e-3, atol=1e-4)


def test_lookm_keeps_a_short_prompt():
    model, batch = tiny.llava(), tiny.inputs([(0, 5), (1, 41)])
    model.set_attn_implementation("vtk")
    with zoo.apply(model, "lookm", recent=0.5, important=0.5), torch.no_grad():
        cache = model(**batch).past_key_values
    whole = model(**batch).past_key_values
    for ours, theirs in zip(cache.layers, whole.layers, strict=True):
        for row, places in enumerate(real(batch)):
            assert torch.equal(ours.keys[row, :, -len(places) :], theirs.keys[row][:, places])


@pytest.mark.parametrize("pruning", [("uniform", "all"), ("fastervlm", 0.8), ("holitom", 0.8)], ids=lambda p: p[0])
def test_beside_pruning(model, inputs, pruning):
    """Batched, padded, with layers of different lengths; of a cache that loses nothing, the same tokens."""
    options = {"max_new_tokens": 10, "return_dict_in_generate": True}
    start = inputs["input_ids"].shape[1]
    with zoo.apply(model, *pruning) as prune:
        expected = model.generate(**inputs, **options)
        lengths = [layer.get_seq_length() for layer in expected.past_key_values.layers]
        assert (len(set(lengths)) > 1) == (pruning[0] == "holitom")
        for method in METHODS:
            with zoo.apply(model, method) as handle:
                out = model.generate(**inputs, **options)
                assert handle.last is prune.last
            assert isinstance(out.past_key_values, PackedKVCache)
            assert [layer.get_seq_length() for layer in out.past_key_values.layers] == lengths
            if method != "lookm":  # the model is trained: bits do not change its short answers, missing tokens may
                assert torch.equal(out.sequences[:2, start : start + 2], expected.sequences[:2, start : start + 2])
        with zoo.apply(model, "packed", format="none/none/64"):
            assert torch.equal(model.generate(**inputs, **options).sequences, expected.sequences)
            beams = model.generate(**inputs, num_beams=2, max_new_tokens=4)
        assert torch.equal(beams, model.generate(**inputs, num_beams=2, max_new_tokens=4))


def test_vidkv_marks_what_reaches_the_layer(model, inputs, monkeypatch):
    seen, protected = {}, VidKV.protected

    def noted(recipe, ctx):
        seen["marks"] = protected(recipe, ctx)
        return seen["marks"]

    monkeypatch.setattr(VidKV, "protected", noted)
    with zoo.apply(model, "holitom", 0.9) as handle, zoo.apply(model, "vidkv", protect=0.25), torch.no_grad():
        cache = model(**inputs).past_key_values
    marks, run = seen["marks"], handle.last
    assert marks.shape == run.input_ids.shape and marks.sum(1).tolist() == [64] * 3
    assert not marks[run.input_ids != IMAGE_TOKEN].any()
    for index, layer in enumerate(cache.layers):
        left = run.decoder.get(max((stop for stop in run.decoder if stop <= index), default=None))
        for row in range(3):
            (visual,) = (run.input_ids[row] == IMAGE_TOKEN).nonzero(as_tuple=True)
            reaching = visual if left is None else visual[left[row]]
            assert int(layer.stored.marks[row].sum()) == int(marks[row, reaching].sum())


def test_prompts_without_images_and_later_turns():
    model, text = tiny.llava(), tiny.inputs([(0, 150), (0, 90)])
    model.set_attn_implementation("vtk")
    expected = tiny.new_tokens(model, text)
    with zoo.apply(model, "packed", format="none/none/64"):
        assert torch.equal(tiny.new_tokens(model, text), expected)
        first = model.generate(**text, max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.full((2, 4), 7)], dim=1)
        mask = torch.cat([text["attention_mask"], torch.ones(2, 7, dtype=torch.long)], dim=1)
        both = {"input_ids": ids, "attention_mask": mask}
        second = tiny.new_tokens(model, {**both, "past_key_values": first.past_key_values})
        assert first.past_key_values.layers[0].pages.tokens == 128
        assert model(**text, use_cache=False).past_key_values is None
    assert torch.equal(second, tiny.new_tokens(model, both))


@pytest.mark.parametrize("method", METHODS)
def test_detach_leaves_no_trace(model, method):
    before = trace(model)
    zoo.apply(model, method).remove()
    after = trace(model)
    assert all(values.keys() == after[name].keys() for name, values in before.items())
    with pytest.raises(TypeError, match=f"{method}: expected no keep"):
        zoo.apply(model, method, keep=0.5)


def test_speculation_and_chunks():
    model, text = tiny.llava(), tiny.inputs([(0, 150)])
    model.set_attn_implementation("vtk")
    expected = tiny.new_tokens(model, text)
    text["prompt_lookup_num_tokens"] = 3
    with zoo.apply(model, "packed", format="none/none/64"):
        assert torch.equal(tiny.new_tokens(model, text), expected)
    with zoo.apply(model, "lookm"):
        with pytest.raises(NotImplementedError, match="lookm: expected no speculation"):
            tiny.new_tokens(model, text)
        del text["prompt_lookup_num_tokens"]
        with pytest.raises(ValueError, match="a prompt's 151 tokens in one call, got 100;"):
            tiny.new_tokens(model, text | {"prefill_chunk_size": 100})


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("kivi", {"bits": 3}, "kivi: expected bits to be 2 or 4, got 3"),
        ("kivi", {"residual": -1}, "kivi: expected residual >= 0, got -1"),
        ("kivi", {"group": 5}, "expected group to be one of 32, 64, 128, got 5"),
        ("vidkv", {"protect": 1.5}, r"vidkv: expected protect in \[0, 1\], got 1.5"),
        ("vidkv", {"values": "int2"}, "vidkv: expected values to be one of ternary5, ternary, got 'int2'"),
        ("vidkv", {"window": -2}, "vidkv: expected window >= 0, got -2"),
        ("zipvl", {"tau": 0.0}, r"zipvl: expected tau in \(0, 1\], got 0.0"),
        ("zipvl", {"recent": 0, "random": 0}, "zipvl: expected probes, got recent=0 and random=0"),
        ("zipvl", {"low": "int3"}, "expected k_scheme to be one of"),
        ("lookm", {"mode": "mean"}, "lookm: expected mode to be one of averaged, pivotal, weighted"),
        ("lookm", {"recent": 0.6, "important": 0.6}, r"lookm: expected shares with a sum in \(0, 1\]"),
        ("lookm", {"format": "int4"}, "expected a format"),
        ("packed", {"format": "int4"}, "expected a format"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.make_recipe(method, **options)


def test_evaluation_has_a_row_of_each(model):
    """One, whatever the budgets; and VidKV answers as the whole cache does."""
    drawn = evaluate.held_out(processor(), 36, seed=11)
    batches = [batch for batch in drawn if batch.questions[0].task in ("digit", "where")]
    steps = []
    rows = evaluate.evaluate(
        model, processor(), batches, ["vidkv", "lookm"], [0.25], 1, lambda: steps.append(1), ["int4/int4/64"]
    )
    names = ["all tokens", "vidkv", "lookm", "int4/int4/64", "random", "uniform"]
    assert [row.method for row in rows] == names
    assert len(steps) == evaluate.num_steps(batches, ["vidkv", "lookm"], [0.25], 1, ["int4/int4/64"])
    full, vidkv, lookm, int4 = rows[:4]
    assert [row.tokens for row in rows[:4]] == [256] * 4 and vidkv.prefill_flops == full.prefill_flops
    assert vidkv.mean >= full.mean - 0.1 and int4.mean >= full.mean - 0.1
    assert lookm.kv_bytes < 0.25 * full.kv_bytes and int4.kv_bytes < 0.2 * full.kv_bytes
    assert model.config.text_config._attn_implementation == "vtk"
