"""Dynamic-LLaVA's conditional append: every step against a dense model in which deep layers see what is stored."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny
from vtkernels import attention, zoo
from vtkernels.kv import KVFormat
from vtkernels.kv.pages import Stored
from vtkernels.zoo.methods.dynamic_llava import TextPredictor

attention.register()
ROWS = [(1, 6), (2, 70), (0, 9)]  # images and words
FIRST, STEPS = 2, 170


@pytest.fixture(scope="module")
def model():
    model = tiny.llava(text_layers=4)
    model.set_attn_implementation({"text_config": "vtk"})
    return model


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(1)
    predictor = TextPredictor(32).eval()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return predictor


@torch.no_grad()
def answered(model, inputs, ids, **options):
    """Logits of each of these next tokens [B, n, V] and the cache behind them."""
    with zoo.apply(model, "dynamic_llava", **options):
        cache = model(**inputs).past_key_values
        mask, logits = inputs["attention_mask"], []
        for step in range(ids.shape[1]):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            call = {"input_ids": ids[:, step : step + 1], "attention_mask": mask, "past_key_values": cache}
            logits.append(model(**call).logits[:, 0])
    return torch.stack(logits, dim=1), cache


@torch.no_grad()
def expected(model, inputs, ids, predictor):
    """One prompt: all tokens at once, deep layers behind a mask; which of the next tokens are stored."""
    layers, length = model.model.language_model.layers, inputs["input_ids"].shape[1]
    total = length + ids.shape[1]
    stored = []

    def hide(module, args, kwargs):
        if not stored:
            logits = predictor(args[0][0, length:])
            stored.append(logits[:, 0] > logits[:, 1])
        seen = torch.ones(total, total, dtype=torch.bool).tril()
        seen[:, length:] &= stored[0]
        seen |= torch.eye(total, dtype=torch.bool)
        return args, kwargs | {"attention_mask": torch.zeros(total, total).masked_fill(~seen, -1e30)[None, None]}

    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers[FIRST:]]
    model.set_attn_implementation({"text_config": "eager"})
    try:
        whole = torch.cat([inputs["input_ids"], ids], dim=1)
        images = {name: value for name, value in inputs.items() if name == "pixel_values"}
        return model(input_ids=whole, **images, use_cache=False).logits[0, length:], stored[0]
    finally:
        model.set_attn_implementation({"text_config": "vtk"})
        for hook in hooks:
            hook.remove()


def test_every_step_reads_what_is_stored(model, predictor):
    """Prompts of one batch, padded, that store different tokens; past the end of a page."""
    inputs = tiny.inputs(ROWS)
    ids = torch.randint(3, tiny.IMAGE, (3, STEPS), generator=torch.Generator().manual_seed(2))
    logits, cache = answered(model, inputs, ids, predictor=predictor, layer=FIRST)
    counts = []
    for row in range(len(ROWS)):
        theirs, stored = expected(model, tiny.row(inputs, ROWS, row), ids[row : row + 1], predictor)
        torch.testing.assert_close(logits[row], theirs, rtol=1e-3, atol=1e-3)
        counts.append(int(stored.sum()))
    prompt = inputs["input_ids"].shape[1]
    assert len(set(counts)) > 1 and min(counts) > 0 and max(counts) < STEPS
    for index, layer in enumerate(cache.layers):
        assert layer.get_seq_length() == prompt + STEPS
        places = layer.pages.tokens + layer.keys.shape[2]
        assert layer.pages.tokens >= 128 and places == prompt + (STEPS if index < FIRST else max(counts))
        assert layer.elements == cache.layers[0].elements


def test_without_a_predictor_what_repeats_is_not_stored(model):
    inputs = tiny.inputs([(1, 9)])
    ids = torch.tensor([[7, 7, 7, 9, 7, 9, 8]])
    _, cache = answered(model, inputs, ids, layer=0)
    assert cache.layers[3].keys.shape[2] == inputs["input_ids"].shape[1] + 3  # layer 0: values depend on the word alone
    _, cache = answered(model, inputs, ids, layer=0, threshold=1.0)
    assert cache.layers[3].keys.shape[2] >= inputs["input_ids"].shape[1] + 3


def test_generation_alone_in_a_batch_and_with_beams(model, predictor):
    inputs = tiny.inputs(ROWS)
    with zoo.apply(model, "dynamic_llava", predictor=predictor):
        tokens = tiny.new_tokens(model, inputs, 12)
        for row in range(len(ROWS)):
            assert torch.equal(tiny.new_tokens(model, tiny.row(inputs, ROWS, row), 12)[0], tokens[row])
        beams = model.generate(**inputs, num_beams=3, max_new_tokens=12, do_sample=False)
        alone = model.generate(**tiny.row(inputs, ROWS, 1), num_beams=3, max_new_tokens=12, do_sample=False)
        assert torch.equal(beams[1, -12:], alone[0, -12:])
        inputs["prompt_lookup_num_tokens"] = 3
        with pytest.raises(NotImplementedError, match="dynamic_llava: expected no speculation"):
            tiny.new_tokens(model, tiny.row(inputs, ROWS, 1) | {"prompt_lookup_num_tokens": 3}, 12)


def test_items_fill_places_from_the_front():
    def token(value):
        return torch.full((2, 1, 1, 8), float(value))

    stored = Stored(token(0), token(0), 1, KVFormat("none", "none"))
    for value, wanted in enumerate([(1, 1), (1, 0), (0, 0), (0, 1), (1, 1)], start=1):
        stored = stored.append(token(value), token(value)).remember(torch.tensor(wanted).bool())
    assert stored.tokens == 6 and stored.removable == 0
    assert stored.residual_places().tolist() == [[0, 1, 2, 5], [0, 1, 4, 5]]
    assert stored.keys[:, 0, :, 0].tolist() == [[0, 1, 2, 5], [0, 1, 4, 5]]
    stored = stored.append(token(6), token(6)).remember(torch.tensor([True, False]))
    assert stored.residual_places().tolist() == [[0, 1, 2, 5, 6], [0, 1, 4, 5, -1]]
    assert stored.bias(None).tolist() == [[0] * 5, [0] * 4 + [-torch.inf]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": -1}, "dynamic_llava: expected layer >= 0, got -1"),
        ({"threshold": 2.0}, r"dynamic_llava: expected threshold in \[-1, 1\], got 2.0"),
        ({"format": "int4"}, "expected a format"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.make_recipe("dynamic_llava", **options)


def test_a_layer_that_is_none(model):
    with pytest.raises(ValueError, match="dynamic_llava: expected a layer below 4, got 4"):
        zoo.apply(model, "dynamic_llava", layer=4)
