"""KVQuant's cache: what attention gets against the plain formula, page after page, in batches."""

from __future__ import annotations

import pytest
import torch

from tests.reference import cache_kvquant as reference
from vtkernels import attention, zoo
from vtkernels.zoo import embedded
from vtkernels.zoo.embedded import evaluate
from vtkernels.zoo.embedded.model import processor

attention.register()


@pytest.fixture(scope="module")
def model():
    model, _ = embedded.load()
    model.set_attn_implementation({"text_config": "vtk"})
    return model


@pytest.fixture(scope="module")
def inputs():
    """Two questions, one of them padded."""
    pictures, asked = evaluate.drawn(1, video=False, seed=5)
    return evaluate.ask(processor(), pictures * 2, [asked[i].text for i in (0, -1)])


@torch.no_grad()
@pytest.mark.parametrize(("bits", "outliers", "sinks"), [(4, 0.01, 1), (2, 0.05, 5), (2, 0.0, 0)])
def test_each_layer_against_the_formula(model, inputs, bits, outliers, sinks):
    base = model.config.text_config.rope_parameters["rope_theta"]
    dense = model(**inputs, use_cache=True).past_key_values
    with zoo.apply(model, "kvquant", bits=bits, outliers=outliers, sinks=sinks):
        cache = model(**inputs).past_key_values
    for ours, theirs in zip(cache.layers, dense.layers, strict=True):
        assert ours.pages.tokens == 256
        indices = ours.pages.exact[0]
        assert indices.dtype == torch.int16 and indices.shape == (2, 2, 2, round(outliers * 128 * 32))
        for row in range(2):
            expected = reference.kvquant(
                theirs.keys[row].double(), theirs.values[row].double(), bits, 32, outliers, sinks, base
            )
            for x, y in zip(ours.stored.unpack(), expected, strict=True):
                wrong = (x[row].double() - y).abs() > 2e-3 * y.abs().amax((-2, -1), keepdim=True)
                assert wrong.double().mean() < 0.01


@torch.no_grad()
def test_pages_appended_later_and_items_moved(model):
    """A page at a time as all at once; reordered and repeated as filled so."""
    k, v = torch.randn(2, 2, 2, 300, 32, generator=torch.Generator().manual_seed(0))
    with zoo.apply(model, "kvquant"):
        layers = [model(input_ids=torch.tensor([[1, 5]])).past_key_values.layers[0] for _ in range(3)]
    for layer in layers:
        layer.reset()
    layers[0].update(k, v)
    for start, stop in ((0, 130), (130, 131), (131, 300)):
        layers[1].update(k[:, :, start:stop], v[:, :, start:stop])
    layers[2].update(k.flip(0), v.flip(0))
    layers[2].reorder_cache(torch.tensor([1, 0]))
    layers[2].batch_repeat_interleave(1)
    for other in layers[1:]:
        assert all(map(torch.equal, layers[0].stored.unpack(), other.stored.unpack()))
    exact = layers[0].pages.exact
    assert layers[0].nbytes == sum(
        x.nbytes for x in (*layers[0].pages.packed, *exact, layers[0].keys, layers[0].values)
    )


@torch.no_grad()
def test_answers_are_those_of_the_whole_cache(model, inputs):
    expected = model.generate(**inputs, max_new_tokens=8)
    with zoo.apply(model, "kvquant"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=8), expected)
        beams = model.generate(**inputs, max_new_tokens=4, num_beams=2)
    assert torch.equal(beams, model.generate(**inputs, max_new_tokens=4, num_beams=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "kvquant: expected bits to be 2 or 4, got 3"),
        ({"outliers": 0.6}, r"kvquant: expected outliers in \[0, 0.5\], got 0.6"),
        ({"sinks": 129}, r"kvquant: expected sinks in \[0, 128\], got 129"),
        ({"group": 5}, "expected group to be one of 32, 64, 128, got 5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.make_recipe("kvquant", **options)
