"""Every method against its formula in plain loops, on random models: the same kept indices, bitwise the same rows."""

from __future__ import annotations

import copy
import sys
from typing import ClassVar

import pytest
import torch

from tests.models import tiny
from tests.reference import recipes
from vtkernels import attention_scores, zoo

GRID = 6
PROMPTS = [(2, 5), (1, 3), (0, 4), (1, 9)]


class Oracle:
    """What the references need of one model and batch, from an eager float64 copy of the model."""

    def __init__(self, seed: int, layers: int, tower: str = "clip"):
        self.model = tiny.llava(seed, tower=tower, grid=GRID, vision_layers=layers)
        self.batch = tiny.inputs(PROMPTS, grid=GRID, seed=seed, side="right")
        exact = copy.deepcopy(self.model).double()
        exact.set_attn_implementation("eager")
        with torch.no_grad():
            self.attention, hidden = recipes.encoder_attention(exact, self.batch["pixel_values"])
            self.features = hidden[-2][:, 1:] if tower == "clip" else hidden[-2]
            self.tokens = exact.model.multi_modal_projector(self.features)
            self.words = [
                exact.get_input_embeddings()(ids[ids > 2])
                for ids in self.batch["input_ids"].masked_fill(self.batch["input_ids"] == tiny.IMAGE, 0)
            ]
        self.rows = [r for r, (images, _) in enumerate(PROMPTS) for _ in range(images)]
        self.has_cls = tower == "clip"
        self.deep = layers - 2  # hidden_states[-2] is this layer's output

    def kept(self, method: str, keep: int, **options) -> list[list[int]]:
        with zoo.apply(self.model, method, keep=keep, **options) as handle, torch.no_grad():
            self.model(**self.batch)
        return handle.last.indices.tolist()

    def layer(self, index: int) -> torch.Tensor:
        return self.attention[index]

    def received(self, index: int, **how) -> list[list[float]]:
        return [recipes.received(image, self.has_cls, **how) for image in self.layer(index)]


@pytest.fixture(scope="module", params=[(0, 3), (1, 4), (2, 6)], ids=lambda p: f"seed{p[0]}-{p[1]}layers")
def oracle(request):
    return Oracle(*request.param)


@pytest.fixture(scope="module")
def siglip():
    return Oracle(3, 4, tower="siglip")


@pytest.mark.parametrize("keep", [1, 7, 35])
def test_fastervlm(oracle, keep):
    expected = [recipes.fastervlm(image, keep) for image in oracle.layer(oracle.deep)]
    assert oracle.kept("fastervlm", keep) == expected


def test_fastervlm_layer(oracle):
    expected = [recipes.fastervlm(image, 9) for image in oracle.layer(0)]
    assert oracle.kept("fastervlm", 9, layer=0) == expected


@pytest.mark.parametrize("start", [None, 0])
def test_vtc_cls(oracle, start):
    layers = len(oracle.attention)
    first = min(round(layers * 16 / 24), layers - 2) if start is None else start
    per_image = [[layer[image] for layer in oracle.attention] for image in range(len(oracle.rows))]
    expected = [recipes.vtc_cls(attentions, first, 10) for attentions in per_image]
    assert oracle.kept("vtc_cls", 10, start_layer=start) == expected


@pytest.mark.parametrize("strategy, keep", [("rank", 10), ("row", 12), ("row", 15), ("row", 4)])
def test_fopru(oracle, strategy, keep):
    expected = [recipes.fopru(scores, GRID, keep, strategy) for scores in oracle.received(oracle.deep)]
    assert oracle.kept("fopru", keep, strategy=strategy) == expected


def test_fopru_options(oracle):
    heads = [recipes.fopru(scores, GRID, 10, "rank") for scores in oracle.received(0, reduce=max)]
    assert oracle.kept("fopru", 10, layer=0, head_reduce="max") == heads
    voters = [recipes.fopru(recipes.cls_scores(image), GRID, 12, "row") for image in oracle.layer(oracle.deep)]
    assert oracle.kept("fopru", 12, strategy="row", query_rows="cls") == voters


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("keep, alpha", [(8, 0.1), (26, 0.1), (20, 0.5), (30, 0.9)])
def test_hiprune(oracle, keep, alpha, wrap):
    middle = max(1, round(len(oracle.attention) * 9 / 24)) - 1
    maps = zip(oracle.received(middle), oracle.received(oracle.deep), strict=True)
    expected = [recipes.hiprune(mid, deep, GRID, keep, alpha, wrap) for mid, deep in maps]
    assert oracle.kept("hiprune", keep, alpha=alpha, released_wrap=wrap) == expected


@pytest.mark.parametrize("mode", ["max_sum", "max_min"])
@pytest.mark.parametrize("keep", [1, 9])
def test_todre(oracle, mode, keep):
    pivots = [recipes.top(recipes.cls_scores(image), 1)[0] for image in oracle.layer(-1)]
    expected = [recipes.todre(t, p, keep, mode) for t, p in zip(oracle.tokens, pivots, strict=True)]
    assert oracle.kept("todre", keep, mode=mode) == expected


@pytest.mark.parametrize("keep", [1, 9, 30])
def test_mmtok(oracle, keep):
    images = range(len(oracle.rows))
    expected = [recipes.mmtok(oracle.words[oracle.rows[i]], oracle.tokens[i], oracle.features[i], keep) for i in images]
    assert oracle.kept("mmtok", keep) == expected


def test_methods_without_cls(siglip):
    deep = siglip.received(siglip.deep)
    assert siglip.kept("fopru", 10) == [recipes.fopru(scores, GRID, 10, "rank") for scores in deep]
    middle = siglip.received(max(1, round(len(siglip.attention) * 9 / 24)) - 1)
    maps = zip(middle, deep, strict=True)
    assert siglip.kept("hiprune", 20, alpha=0.5) == [recipes.hiprune(m, d, GRID, 20, 0.5, False) for m, d in maps]
    pivot = int(torch.randint(GRID * GRID, (1,), generator=torch.Generator().manual_seed(5)))
    assert siglip.kept("todre", 9, seed=5) == [recipes.todre(t, pivot, 9, "max_sum") for t in siglip.tokens]


@pytest.mark.parametrize(
    "method, options",
    [("fastervlm", {}), ("hiprune", {}), ("vtc_cls", {}), ("vflowopt", {"threshold": 1.0, "cell": 2})],
)
def test_scores_read_from_the_towers_own_pass(oracle, monkeypatch, method, options):
    """On "vtk" its log-sum-exp serves every call, and the same patches stay."""
    calls = []

    def watched(query, key, *, lse=None, **how):
        scores = attention_scores(query, key, lse=lse, **how)
        torch.testing.assert_close(scores, attention_scores(query, key, **how), rtol=1e-5, atol=1e-8)
        calls.append(lse)
        return scores

    for module in ("recipe", "methods.vflowopt"):
        monkeypatch.setattr(sys.modules[f"vtkernels.zoo.{module}"], "attention_scores", watched)
    owners = []
    for implementation in ("sdpa", "vtk"):
        oracle.model.set_attn_implementation({"vision_config": implementation})
        calls.clear()
        with zoo.apply(oracle.model, method, keep=12, **options) as handle, torch.no_grad():
            oracle.model(**oracle.batch)
        owners.append(handle.last.owner)
        assert calls and all((lse is None) == (implementation == "sdpa") for lse in calls)
    oracle.model.set_attn_implementation({"vision_config": "sdpa"})
    assert torch.equal(*owners)


class WordTokenizer:
    """Ids are words w3, w4, ...; some of them the method's stop words."""

    names: ClassVar = {10: "the", 11: "what", 12: "The"}

    def decode(self, ids, skip_special_tokens):
        words = " ".join(self.names.get(i, f"w{i}") for i in ids if i > 2)
        return f"{words}\nAnswer the question using a single word or phrase."

    def __call__(self, text, add_special_tokens):
        known = {name: i for i, name in self.names.items()}
        return {"input_ids": [known[word] if word in known else int(word[1:]) for word in text.split()]}


def test_mmtok_cleans_the_question_with_a_tokenizer(oracle):
    batch = {name: tensor.clone() for name, tensor in oracle.batch.items()}
    words = torch.tensor([10, 44, 11, 55, 12])
    batch["input_ids"][1, -len(words) - 7 : -7] = words
    batch["attention_mask"][1] = 1
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 0)
    ids = [row[(row > 2) & (row != tiny.IMAGE)] for row in batch["input_ids"]]
    clean = [row[~torch.isin(row, torch.tensor([10, 11, 12]))] for row in ids]
    embed = oracle.model.get_input_embeddings().weight.detach().double()
    expected = [
        recipes.mmtok(embed[clean[oracle.rows[i]]], oracle.tokens[i], oracle.features[i], 9)
        for i in range(len(oracle.rows))
    ]
    with zoo.apply(oracle.model, "mmtok", keep=9, tokenizer=WordTokenizer()) as handle, torch.no_grad():
        oracle.model(**batch)
    assert handle.last.indices.tolist() == expected


def test_mmtok_without_text_covers_the_image(oracle):
    """Only images and padding: the image's own rows decide."""
    ids = torch.tensor([[1] + [tiny.IMAGE] * GRID * GRID])
    with zoo.apply(oracle.model, "mmtok", keep=9) as handle, torch.no_grad():
        oracle.model(input_ids=ids, pixel_values=oracle.batch["pixel_values"][:1])
    assert handle.last.indices.tolist() == [recipes.mmtok([], oracle.tokens[0], oracle.features[0], 9)]


def test_random_is_seeded(oracle):
    first, again, other = (oracle.kept("random", 9, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert all(row == sorted(set(row)) and len(row) == 9 for row in first)


def test_uniform_meets_every_budget(siglip):
    for keep in range(1, GRID * GRID + 1):
        kept = siglip.kept("uniform", keep)
        assert all(row == sorted(set(row)) and len(row) == keep for row in kept)


def test_uniform_is_a_grid(siglip):
    assert siglip.kept("uniform", 4)[0] == [1 * GRID + 1, 1 * GRID + 4, 4 * GRID + 1, 4 * GRID + 4]


@pytest.mark.parametrize("method", tiny.pruning_methods())
def test_kept_features_are_bitwise_the_encoders(oracle, method):
    model, pixels = oracle.model, oracle.batch["pixel_values"]
    seen = {}
    projector = model.model.multi_modal_projector
    watch = projector.register_forward_hook(lambda module, args, output: seen.update(features=args[0], tokens=output))
    with torch.no_grad():
        model.model.get_image_features(pixel_values=pixels, return_dict=True)
        whole = dict(seen)
        handle = zoo.apply(model, method, keep=9)
        # The last hook sees what the language model will get.
        late = projector.register_forward_hook(
            lambda module, args, output: seen.update(features=args[0], tokens=output)
        )
        model(**oracle.batch)
    for hook in (late, watch, handle):
        hook.remove()
    stage = "features" if handle.recipe.stages() == ("vision_encoder",) else "tokens"
    index = handle.last.indices.unsqueeze(-1)
    assert torch.equal(seen[stage], whole[stage].take_along_dim(index, 1))


def test_two_stages_compose(oracle):
    """Indices of the second stage refer to patches, whatever the first one dropped."""
    first = oracle.kept("fastervlm", 18)
    with zoo.apply(oracle.model, "fastervlm", keep=18):
        second = oracle.kept("todre", 6)
    scores = [recipes.cls_scores(image) for image in oracle.layer(-1)]
    expected = []
    for image, patches in enumerate(first):
        pivot = patches.index(recipes.top(scores[image], 1, among=set(patches))[0])
        picks = recipes.todre(oracle.tokens[image][patches], pivot, 6, "max_sum")
        expected.append([patches[pick] for pick in picks])
    assert second == expected
