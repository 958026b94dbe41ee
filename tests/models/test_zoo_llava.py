"""The LLaVA adapter: keep-all equality, batches against single prompts, and generate as the caller knows it."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from tests.models import tiny
from vtkernels import zoo

METHODS = tiny.pruning_methods()
RAGGED = [(1, 4), (2, 9), (0, 5), (1, 7)]
N = 16
NEW = 6


@pytest.fixture(scope="module")
def model():
    return tiny.llava()


def new_tokens(model, batch, **settings):
    out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **settings)
    assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    return out[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [[(1, 5)], [(1, 4), (2, 9), (1, 7)]], ids=["batch1", "batch3"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", ["all", N, 1.0])
def test_keep_all_is_the_untouched_model(model, method, rows, side, keep):
    batch = tiny.inputs(rows, side=side)
    before = logits(model, batch), new_tokens(model, batch)
    with zoo.apply(model, method, keep=keep) as handle:
        assert handle.keep == N
        assert torch.equal(logits(model, batch), before[0])
        assert torch.equal(new_tokens(model, batch), before[1])
    assert handle.last.indices.tolist() == [list(range(N))] * sum(images for images, _ in rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_generates_what_its_rows_generate_alone(model, method, side):
    batch = tiny.inputs(RAGGED, side=side)
    with zoo.apply(model, method, keep=5) as handle:
        together = new_tokens(model, batch)
        kept = handle.last.indices
        alone = []
        for index, (images, _) in enumerate(RAGGED):
            alone.append(new_tokens(model, tiny.row(batch, RAGGED, index)))
            if images:
                first = sum(count for count, _ in RAGGED[:index])
                assert torch.equal(handle.last.indices, kept[first : first + images])
    assert torch.equal(together, torch.cat(alone))


def test_siglip_tower():
    siglip = tiny.llava(tower="siglip")
    batch = tiny.inputs(RAGGED)
    before = logits(siglip, batch), new_tokens(siglip, batch)
    with zoo.apply(siglip, "hiprune", keep="all"):
        assert torch.equal(logits(siglip, batch), before[0])
        assert torch.equal(new_tokens(siglip, batch), before[1])
    with zoo.apply(siglip, "hiprune", keep=5):
        together = new_tokens(siglip, batch)
        alone = [new_tokens(siglip, tiny.row(batch, RAGGED, index)) for index in range(len(RAGGED))]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method):
    model, batch = tiny.llava().bfloat16(), tiny.inputs(RAGGED)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with zoo.apply(model, method, keep=5) as handle:
        assert new_tokens(model, batch).shape == (len(RAGGED), NEW)
    assert all(kept == sorted(set(kept)) and len(kept) == 5 for kept in handle.last.indices.tolist())


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_returns_the_shortened_prompts_logits(model, side):
    batch = tiny.inputs(RAGGED, side=side)
    with zoo.apply(model, "fastervlm", keep=5) as handle:
        together, last = logits(model, batch), handle.last
        assert together.shape[1] == last.input_ids.shape[1] == max(last.tokens_after)
        for index, (images, words) in enumerate(RAGGED):
            assert last.tokens_before[index] == 1 + words + N * images
            assert last.tokens_after[index] == 1 + words + 5 * images
            mask = last.attention_mask[index].bool()
            # The padding stays on the side on which the caller put it.
            edge = slice(None, last.tokens_after[index]) if side == "right" else slice(-last.tokens_after[index], None)
            assert mask[edge].all() and mask.sum() == last.tokens_after[index]
            alone = logits(model, tiny.row(batch, RAGGED, index))
            torch.testing.assert_close(together[index, mask], alone[0], rtol=1e-4, atol=1e-4)
    assert last.rows == [0, 1, 1, 3]


def test_pruning_is_masking_the_projected_features(model):
    """Gathering before the projector equals projecting everything and embedding the kept rows by hand."""
    batch = tiny.inputs([(1, 6)])
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True).pooler_output[0]
    with zoo.apply(model, "fastervlm", keep=5) as handle:
        pruned = logits(model, batch)
    kept = handle.last.indices[0]
    ids = handle.last.input_ids
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == tiny.IMAGE] = features[kept]
        expected = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_labels_and_token_types_are_shortened(model, method):
    batch = tiny.inputs([(1, 6), (2, 4)])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == tiny.IMAGE, -100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    types = (batch["input_ids"] == tiny.IMAGE).long()
    with zoo.apply(model, method, keep=5) as handle:
        out = model(**batch, labels=labels, mm_token_type_ids=types)
        out.loss.backward()
    ids = handle.last.input_ids
    expected = ids.masked_fill((ids == tiny.IMAGE) | (handle.last.attention_mask == 0), -100)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), expected[:, 1:].flatten())
    torch.testing.assert_close(out.loss, loss)
    gradient = model.model.vision_tower.get_parameter("embeddings.patch_embedding.weight").grad
    assert gradient is not None and gradient.abs().sum() > 0
    model.zero_grad()


def test_positional_arguments_and_given_positions(model):
    batch = tiny.inputs(RAGGED)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with zoo.apply(model, "fastervlm", keep=5), torch.no_grad():
        named = logits(model, batch)
        by_place = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).logits
        placed = model(**batch, position_ids=positions).logits
        shifted = model(**batch, position_ids=positions + 3).logits
    assert torch.equal(named, by_place) and torch.equal(named, placed)
    assert not torch.equal(named, shifted)  # the caller's own start is kept
    torch.testing.assert_close(named, shifted, rtol=1e-3, atol=1e-3)  # rotary positions are relative


def test_text_only_passes_through(model):
    batch = tiny.inputs([(0, 8), (0, 5)])
    before = logits(model, batch), new_tokens(model, batch)
    with zoo.apply(model, "mmtok", keep=5) as handle:
        assert torch.equal(logits(model, batch), before[0])
        assert torch.equal(new_tokens(model, batch), before[1])
    assert handle.last is None


def test_manual_decoding_continues_from_forward(model):
    batch = tiny.inputs([(1, 6), (1, 3)])
    with zoo.apply(model, "fastervlm", keep=5) as handle, torch.no_grad():
        expected = new_tokens(model, batch)
        out = model(**batch, use_cache=True)
        mask, tokens = handle.last.attention_mask, []
        for step in range(NEW):
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = torch.tensor(handle.last.tokens_after).unsqueeze(1) + step
            out = model(tokens[-1], attention_mask=mask, position_ids=positions, past_key_values=out.past_key_values)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


def test_get_image_features_outside_a_call_is_untouched(model):
    pixels = tiny.inputs([(2, 3)])["pixel_values"]
    before = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    with zoo.apply(model, "fastervlm", keep=5):
        during = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))


def test_the_vision_tower_runs_once_without_attention_weights(model):
    calls = []
    watch = model.model.vision_tower.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs), with_kwargs=True
    )
    with zoo.apply(model, "vtc_cls", keep=5):
        new_tokens(model, tiny.inputs(RAGGED))
    watch.remove()
    assert len(calls) == 1 and not calls[0].get("output_attentions")
    assert model.config.vision_config._attn_implementation == "sdpa"


# generate, seen from outside.


@pytest.fixture
def pruned(model):
    with zoo.apply(model, "fastervlm", keep=5):
        yield model


@pytest.fixture
def batch():
    return tiny.inputs(RAGGED)


def test_prompt_without_mask_or_by_position(pruned):
    alone = tiny.inputs([(1, 6)])
    expected = new_tokens(pruned, alone)
    ids, pixels = alone["input_ids"], alone["pixel_values"]
    out = pruned.generate(ids, pixel_values=pixels, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, torch.cat([ids, expected], dim=1))
    # Padding ids are recognised as generate recognises them.
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    out = pruned.generate(inputs=padded, pixel_values=pixels, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out[:, padded.shape[1] :], expected)


def test_lengths_count_the_original_prompt(pruned, batch):
    length = batch["input_ids"].shape[1]
    expected = new_tokens(pruned, batch)
    assert pruned.generate(**batch, max_length=length + 3, do_sample=False).shape[1] == length + 3
    assert torch.equal(pruned.generate(**batch, max_length=length + NEW, do_sample=False)[:, length:], expected)
    # max_new_tokens wins over max_length, as it does in generate.
    assert pruned.generate(**batch, max_length=length + 3, max_new_tokens=2, do_sample=False).shape[1] == length + 2
    with pytest.warns(UserWarning, match="model-agnostic default"):
        assert pruned.generate(**batch, do_sample=False).shape[1] == length + 20


def test_minimal_length_counts_the_original_prompt(pruned):
    alone = tiny.inputs([(1, 6)])
    length = alone["input_ids"].shape[1]
    first = int(new_tokens(pruned, alone)[0, 0])
    settings = {"eos_token_id": first, "max_new_tokens": NEW, "do_sample": False}
    assert pruned.generate(**alone, **settings).shape[1] == length + 1
    out = pruned.generate(**alone, **settings, min_length=length + 3)
    assert first not in out[0, length : length + 2].tolist()
    assert torch.equal(out, pruned.generate(**alone, **settings, min_new_tokens=3))


def test_a_generation_config_is_read_and_left_alone(pruned, batch):
    length = batch["input_ids"].shape[1]
    config = type(pruned.generation_config)(max_length=length + 2, do_sample=False, pad_token_id=0)
    assert pruned.generate(**batch, generation_config=config).shape[1] == length + 2
    assert config.max_length == length + 2


class Stop(StoppingCriteria):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids)
        return torch.full((len(input_ids),), len(self.seen) == 3, device=input_ids.device)


class Watch(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids)
        return scores


def test_criteria_and_processors_see_the_original_prompt(pruned, batch):
    stop, watch = Stop(), Watch()
    out = pruned.generate(
        **batch,
        max_new_tokens=NEW,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([stop]),
        logits_processor=LogitsProcessorList([watch]),
    )
    length = batch["input_ids"].shape[1]
    assert out.shape[1] == length + 3
    for step in range(3):
        assert torch.equal(stop.seen[step], out[:, : length + step + 1])
        assert torch.equal(watch.seen[step], out[:, : length + step])


def test_allowed_tokens_see_the_original_prompt(pruned, batch):
    seen = []

    def allowed(row, ids):
        seen.append(torch.equal(ids[: batch["input_ids"].shape[1]], batch["input_ids"][row]))
        return [7, 8]

    assert set(new_tokens(pruned, batch, prefix_allowed_tokens_fn=allowed).flatten().tolist()) <= {7, 8}
    assert seen and all(seen)


class Streamer(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended = True


def test_streamer_gets_the_original_prompt_first(pruned):
    alone, streamer = tiny.inputs([(1, 6)]), Streamer()
    expected = new_tokens(pruned, alone, streamer=streamer)
    assert torch.equal(streamer.values[0], alone["input_ids"])
    assert torch.equal(torch.cat(streamer.values[1:]).flatten(), expected[0])
    assert streamer.ended


def test_return_dict(pruned, batch):
    expected = new_tokens(pruned, batch)
    out = pruned.generate(
        **batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(out.sequences, torch.cat([batch["input_ids"], expected], dim=1))
    assert torch.equal(out["sequences"], out.sequences)
    assert len(out.scores) == NEW
    assert out.past_key_values.get_seq_length() < batch["input_ids"].shape[1]


@pytest.mark.parametrize("rows", [[(1, 6)], [(1, 6), (1, 3)]], ids=["batch1", "batch2"])
def test_beams_and_several_sequences(pruned, rows):
    batch = tiny.inputs(rows)
    length = batch["input_ids"].shape[1]
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": NEW, "do_sample": False}
    out = pruned.generate(**batch, **settings)
    assert torch.equal(out[:, :length], batch["input_ids"].repeat_interleave(2, dim=0))
    for index in range(len(rows)):
        alone = tiny.row(batch, rows, index)
        expected = pruned.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(out[2 * index : 2 * index + 2, length:], expected)
    torch.manual_seed(0)
    sampled = pruned.generate(**batch, do_sample=True, num_return_sequences=3, max_new_tokens=2)
    assert sampled.shape == (3 * len(rows), length + 2)


@pytest.mark.parametrize(
    "settings",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
    ids=lambda settings: next(iter(settings)),
)
def test_every_way_to_decode_agrees(pruned, settings):
    alone = tiny.inputs([(2, 6)])
    assert torch.equal(new_tokens(pruned, alone, **settings), new_tokens(pruned, alone))


def test_sampling_is_reproducible(pruned, batch):
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(pruned.generate(**batch, do_sample=True, max_new_tokens=NEW))
    assert torch.equal(*outs)
