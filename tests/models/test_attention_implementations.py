"""Models of transformers on "vtk" and "vtk_sparse" attention: the tokens that they generate on "sdpa"."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import vtkernels.attention
from tests.models import tiny
from vtkernels import attention_scores
from vtkernels.zoo import embedded
from vtkernels.zoo.embedded import evaluate

IMPLEMENTATIONS = ["vtk", "vtk_sparse"]


def llama(seed: int = 0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**(sizes | heads | options), pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return transformers.LlamaForCausalLM(config).eval()


def qwen2_5_vl(seed: int = 0):
    torch.manual_seed(seed)
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [1]}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 120}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    ids = {"image_token_id": 110, "video_token_id": 111, "vision_start_token_id": 112, "vision_end_token_id": 113}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config={**text, "pad_token_id": 0}, **ids)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_inputs(grid=(1, 8, 12)):
    """One image of 8 x 12 patches, 24 visual tokens, in the second of two left-padded prompts."""
    visual = [112, *[110] * (grid[1] * grid[2] // 4), 113]
    rows = [[5, 6, 7, 8, 9], [5, *visual, 9, 10, 11]]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    pixels = torch.randn(grid[1] * grid[2], 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(3))
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": (ids == 110).int(),
    }


def prompts(lengths, side="left", vocabulary=97):
    random, longest = torch.Generator().manual_seed(1), max(lengths)
    ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest).long()
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(length)
        ids[row, place] = torch.randint(2, vocabulary, (length,), generator=random)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, implementation, inputs):
    model.set_attn_implementation(implementation)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, 1)


def same_as_sdpa(model, implementation, inputs):
    ids, logits = generated(model, "sdpa", inputs)
    ours, our_logits = generated(model, implementation, inputs)
    assert torch.equal(ours, ids)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", [[9], [150], [5, 140, 17]])
def test_llama(implementation, lengths):
    same_as_sdpa(llama(), implementation, prompts(lengths))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_qwen2_5_vl(implementation):
    same_as_sdpa(qwen2_5_vl(), implementation, qwen_inputs())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_llava(implementation):
    model = tiny.llava(0)
    same_as_sdpa(model, implementation, tiny.inputs([(1, 5), (2, 9)], side="left"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_embedded_model(implementation):
    model, processor = embedded.load()
    pictures, asked = evaluate.drawn(1, video=False, seed=5)
    inputs = evaluate.ask(processor, pictures * len(asked), [question.text for question in asked])
    same_as_sdpa(model, implementation, inputs)


def test_right_padding_and_rows_of_padding():
    model, inputs = llama(), prompts([4, 30], side="right")
    outs = []
    for implementation in ("sdpa", "vtk"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outs.append(model(**inputs).logits)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(outs[0][real], outs[1][real], rtol=1e-4, atol=1e-5)


def test_layers_of_different_length():
    """A cache of which deeper layers hold fewer keys, as pruning leaves it."""
    model, inputs = llama(), prompts([40])
    outs = []
    for implementation in ("sdpa", "vtk"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            cache = model(input_ids=inputs["input_ids"], use_cache=True).past_key_values
            for layer, length in ((1, 25), (2, 7)):
                cache.layers[layer].keys = cache.layers[layer].keys[:, :, :length]
                cache.layers[layer].values = cache.layers[layer].values[:, :, :length]
            step = torch.tensor([[5]])
            outs.append(model(input_ids=step, past_key_values=cache, position_ids=torch.tensor([[40]])).logits)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)


def test_a_producers_lists_are_attended():
    model, inputs = llama(max_position_embeddings=512), prompts([300])
    layers = []

    def sink_and_diagonal(module, query, key):
        if query.shape[2] == 1:
            return None
        layers.append(module.layer_idx)
        return vtkernels.attention.from_blocks(torch.eye(3, dtype=torch.bool)[None, None], causal=True)

    def logits(implementation, mask):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            return model(input_ids=inputs["input_ids"], attention_mask=mask).logits

    blocks = torch.eye(3, dtype=torch.bool).repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :300]
    expected = logits("sdpa", blocks.tril()[None, None])
    with vtkernels.attention.sparse(model, sink_and_diagonal):
        sparse = logits("vtk_sparse", None)
    torch.testing.assert_close(sparse, expected, rtol=1e-4, atol=1e-5)
    assert layers == [0, 1, 2]
    torch.testing.assert_close(logits("vtk_sparse", None), logits("sdpa", None), rtol=1e-4, atol=1e-5)


def test_a_rule_that_sees_everything_generates_sdpas_tokens():
    model, everything = llama(), vtkernels.attention.Rule.streaming(0, 1000)
    with vtkernels.attention.sparse(model, lambda *_: everything):
        same_as_sdpa(model, "vtk_sparse", prompts([5, 140, 17]))


@pytest.mark.parametrize("lengths", [[150], [5, 140, 17]])
def test_a_streaming_rule_in_prefill_and_decoding(lengths):
    """Token by token, what a masked sdpa of each prompt alone, without its padding, generates."""
    model, inputs = llama(), prompts(lengths)
    rule = vtkernels.attention.Rule.streaming(4, 20)
    with vtkernels.attention.sparse(model, lambda *_: rule):
        ids, logits = generated(model, "vtk_sparse", inputs)
    model.set_attn_implementation("sdpa")
    for row, length in enumerate(lengths):
        alone = ids[row, -12 - length :]
        at = torch.arange(len(alone))
        back = at[:, None] - at
        seen = (back >= 0) & ((back < 20) | (at < 4))
        with torch.no_grad():
            expected = model(input_ids=alone[None], attention_mask=seen[None, None]).logits[0, -13:-1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(expected.argmax(-1), alone[-12:])


def attentions(model):
    return {layer.self_attn.layer_idx: layer.self_attn for layer in model.model.layers}


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_recorded_pass_is_the_models_attention(implementation):
    """Left padding and grouped queries, against the matrices of a float64 model on each prompt alone."""
    model, inputs = llama(), prompts([140, 23])
    real = inputs["attention_mask"].bool()
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    alone = [
        exact(ids[mask][None], output_attentions=True) for ids, mask in zip(inputs["input_ids"], real, strict=True)
    ]
    model.set_attn_implementation(implementation)
    with vtkernels.attention.recording(attentions(model)) as passes:
        model(**inputs)
    assert sorted(passes) == [0, 1, 2]
    for layer, done in passes.items():
        options = {"scale": done.scale, "key_mask": done.key_bias == 0}
        last = attention_scores(done.query[:, :, -1:], done.key, lse=done.lse[:, :, -1:], **options)
        options |= {"causal": True, "query_mask": real}
        every = attention_scores(done.query, done.key, lse=done.lse, **options)
        torch.testing.assert_close(every, attention_scores(done.query, done.key, **options), rtol=1e-5, atol=1e-8)
        for row, out in enumerate(alone):
            weights = out.attentions[layer][0].mean(0)
            torch.testing.assert_close(last[row, real[row]].double(), weights[-1], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(every[row, real[row]].double(), weights.mean(0), rtol=1e-4, atol=1e-7)
            assert not last[row, ~real[row]].any() and not every[row, ~real[row]].any()


@torch.no_grad()
def test_recorded_steps_on_layers_of_different_length():
    model, inputs = llama(), prompts([40])
    model.set_attn_implementation("vtk")
    cache = model(**inputs, use_cache=True).past_key_values
    for layer, length in ((1, 25), (2, 7)):
        cache.layers[layer].keys = cache.layers[layer].keys[:, :, :length]
        cache.layers[layer].values = cache.layers[layer].values[:, :, :length]
    with vtkernels.attention.recording(attentions(model)) as passes:
        model(input_ids=torch.tensor([[5]]), past_key_values=cache, position_ids=torch.tensor([[40]]))
    assert [passes[layer].key.shape[2] for layer in range(3)] == [41, 26, 8]
    for done in passes.values():
        logits = done.query.double() @ done.key.repeat_interleave(2, 1).double().mT * done.scale
        scores = attention_scores(done.query, done.key, lse=done.lse, scale=done.scale)
        torch.testing.assert_close(scores.double(), logits.softmax(-1).mean(1)[:, 0], rtol=1e-4, atol=1e-6)


def test_what_is_recorded_and_when():
    model, inputs = llama(), prompts([30])
    modules = attentions(model)

    def diagonal(module, query, key):
        return vtkernels.attention.from_blocks(torch.eye(1, dtype=torch.bool)[None, None], causal=True)

    model.set_attn_implementation("vtk_sparse")
    with vtkernels.attention.recording({"deep": modules[2]}) as outer:
        with vtkernels.attention.recording(modules) as inner, vtkernels.attention.sparse(model, diagonal):
            model(**inputs)
        assert len(inner) == 3 and inner[2] is outer["deep"]
        assert all(done.lse is None for done in inner.values())  # of the listed keys only
        model(**inputs)
    assert inner[2].lse is None and outer["deep"].lse is not None and not outer["deep"].query.requires_grad
    assert not any("_vtk_records" in module.__dict__ for module in modules.values())
    model.set_attn_implementation("sdpa")
    with vtkernels.attention.recording(modules) as passes:
        model(**inputs)
    assert passes == {}


def test_what_is_not_served_says_so():
    model, inputs = llama(), prompts([9])
    model.set_attn_implementation("vtk")
    with pytest.raises(NotImplementedError, match="a cache that grows"):
        model.generate(**inputs, max_new_tokens=3, cache_implementation="static", disable_compile=True)
    with pytest.raises(NotImplementedError, match=r"float32 \[B, N = 9\], got torch.bool \[1, 1, 9, 9\]"):
        model(input_ids=inputs["input_ids"], attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    config = transformers.MistralConfig(**{**model.config.to_dict(), "sliding_window": 4, "model_type": "mistral"})
    sliding = transformers.MistralForCausalLM(config).eval()
    sliding.set_attn_implementation("vtk")
    with pytest.raises(NotImplementedError, match="sliding windows"):
        sliding(**inputs)
