"""Video-XL-2's cache of two levels against the plain formula, and a video's answers from it."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny
from tests.reference import cache_bilevel as reference
from vtkernels import attention, zoo
from vtkernels.zoo import embedded
from vtkernels.zoo.embedded import evaluate
from vtkernels.zoo.embedded.model import processor

attention.register()
ROWS = [(7, 18), (4, 11), (1, 9)]  # frames and words


@pytest.fixture(scope="module")
def model():
    model = tiny.llava()
    model.set_attn_implementation({"text_config": "vtk"})
    return model


@pytest.fixture(scope="module")
def prompt(model):
    """What the model makes of the prompts: keys and values of each layer, and attention of the eager kind."""
    inputs = tiny.inputs(ROWS)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        model.set_attn_implementation({"text_config": "eager"})
        attentions = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation({"text_config": "vtk"})
    return inputs, cache.layers, attentions


@torch.no_grad()
@pytest.mark.parametrize(("chunk", "pool", "relevant"), [(None, 5, 0.4), (2, 16, 0.0), (1, 3, 1.0)])
def test_each_layer_against_the_formula(model, prompt, chunk, pool, relevant):
    """Timestamps and questions as they were; frames of 16 tokens in windows whose last is shorter; padding."""
    inputs, layers, attentions = prompt
    with zoo.apply(model, "video_xl2", chunk=chunk, pool=pool, relevant=relevant):
        cache = model(**inputs).past_key_values
    lengths = set()
    for layer, dense, weights in zip(cache.layers, layers, attentions, strict=True):
        assert layer.get_seq_length() == inputs["input_ids"].shape[1]
        for row in range(len(ROWS)):
            (places,) = inputs["attention_mask"][row].nonzero(as_tuple=True)
            visual = (inputs["input_ids"][row, places] == tiny.IMAGE).tolist()
            pooled = reference.pooled_units(weights[row][:, places][:, :, places], visual, chunk or 1, relevant)
            held = layer.stored.unpack() if relevant == 1 else (layer.keys, layer.values)
            for ours, theirs in zip(held, (dense.keys, dense.values), strict=True):
                expected = reference.bilevel(theirs[row][:, places].double(), pooled, pool)
                count = expected.shape[1]
                lengths.add(count - len(places))
                torch.testing.assert_close(ours[row, :, -count:].double(), expected, rtol=1e-4, atol=1e-5)
    assert 0 in lengths and (len(lengths) > 1) == (relevant < 1)


@torch.no_grad()
def test_decoding_reads_both_levels(model, prompt):
    """The row of a token behind them against attention on what the layer holds, alone and in a batch."""
    inputs = prompt[0]
    with zoo.apply(model, "video_xl2", pool=4):
        tokens = tiny.new_tokens(model, inputs, 6)
        for row in range(len(ROWS)):
            assert torch.equal(tiny.new_tokens(model, tiny.row(inputs, ROWS, row), 6)[0], tokens[row])
        beams = model.generate(**inputs, num_beams=2, max_new_tokens=4, do_sample=False)
    assert beams.shape == (3, inputs["input_ids"].shape[1] + 4)


@torch.no_grad()
def test_videos_are_answered_from_half_a_cache():
    """The embedded model, with a row of the evaluation."""
    model, _ = embedded.load()
    batches = evaluate.held_out(processor(), 3, video=True)[:1]
    rows = evaluate.evaluate(model, processor(), batches, ["video_xl2"], [0.5], 1)
    full, ours = rows[:2]
    assert ours.method == "video_xl2" and ours.tokens == full.tokens
    assert 0.5 * full.kv_bytes < ours.kv_bytes < 0.6 * full.kv_bytes


def test_speculation_is_refused(model):
    text = tiny.inputs([(3, 150)])
    text["prompt_lookup_num_tokens"] = 3
    with zoo.apply(model, "video_xl2"), pytest.raises(NotImplementedError, match="video_xl2: expected no speculation"):
        tiny.new_tokens(model, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "video_xl2: expected chunk >= 1, got 0"),
        ({"pool": 1}, "video_xl2: expected pool >= 2, got 1"),
        ({"relevant": 1.5}, r"video_xl2: expected relevant in \[0, 1\], got 1.5"),
        ({"format": "int4"}, "expected a format"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.make_recipe("video_xl2", **options)
