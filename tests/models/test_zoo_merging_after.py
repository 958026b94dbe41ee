"""The methods that merge after the encoder, or choose among the frames of a video: each against its formula."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor
from torch.nn.functional import cosine_similarity, normalize

from tests.models import tiny
from tests.reference import merging_after, recipes
from vtkernels import zoo
from vtkernels.zoo.embedded import evaluate
from vtkernels.zoo.embedded import model as embedded
from vtkernels.zoo.methods import holitom, lookm, recoverable_compression
from vtkernels.zoo.methods.sit import TokenSlimming

GRID = 4
N = GRID * GRID
PROMPTS = [(1, 4), (3, 9), (0, 5), (2, 7)]
METHODS = [method.name for method in zoo.methods() if method.merges and "vision_layers" not in method.stages]


@pytest.fixture(scope="module")
def model():
    return tiny.llava()


# Every method: what must hold whatever it computes.


def scenes(prompts, seed: int = 0, side: str = "left", grid: int = GRID):
    """Prompts whose images are frames: each like the one before, but for some patches."""
    batch = tiny.inputs(prompts, side=side, seed=seed, grid=grid)
    draw = torch.Generator().manual_seed(seed)
    start = 0
    for images, _ in prompts:
        for frame in range(start + 1, start + images):
            change = torch.rand(grid, grid, generator=draw) < (0.2 if frame % 3 else 0.9)
            change = change.repeat_interleave(tiny.PATCH, 0).repeat_interleave(tiny.PATCH, 1)
            batch["pixel_values"][frame] = batch["pixel_values"][frame].where(change, batch["pixel_values"][frame - 1])
        start += images
    return batch


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_keep_all_is_the_untouched_model(model, method):
    batch = scenes(PROMPTS)
    before = model(**batch).logits, tiny.new_tokens(model, batch)
    with zoo.apply(model, method, keep="all") as handle:
        assert torch.equal(model(**batch).logits, before[0]) and torch.equal(tiny.new_tokens(model, batch), before[1])
    assert handle.last.counts == [N] * 6 and handle.last.owner[3].tolist() == list(range(2 * N, 3 * N))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_prompts_alone(model, method, side):
    batch = scenes(PROMPTS, side=side)
    with zoo.apply(model, method, keep=5) as handle:
        together = tiny.new_tokens(model, batch)
        owner, counts = handle.last.owner, handle.last.counts
        assert 0 < sum(counts) < 6 * N and all(count <= N for count in counts)
        for index, (images, _) in enumerate(PROMPTS):
            assert torch.equal(together[index : index + 1], tiny.new_tokens(model, tiny.row(batch, PROMPTS, index)))
            if images:
                first = sum(count for count, _ in PROMPTS[:index])
                part = slice(first, first + images)
                assert torch.equal(handle.last.owner, owner[part]) and handle.last.counts == counts[part]
                # Every token holds a patch, and no owner points outside.
                assert set(owner[part].flatten().tolist()) - {-1} <= set(range(sum(counts[part])))
    assert handle.last.indices is None


@pytest.mark.parametrize("keep", [3, 8])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_gradients_and_labels(method, keep):
    model, batch = tiny.llava().bfloat16(), scenes([(2, 6), (1, 4)])
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == tiny.IMAGE, -100)
    with zoo.apply(model, method, keep=keep):
        model(**batch, labels=labels.masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
    gradient = model.model.vision_tower.get_parameter("embeddings.patch_embedding.weight").grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_evaluation_counts_the_tokens_of_a_prompt(monkeypatch):
    """On a video, for a method that shares its budget out unevenly."""
    monkeypatch.setattr(evaluate, "LONGEST", 2)
    torch.manual_seed(0)
    model, processor = embedded.new_model().eval(), embedded.processor()
    (batch, *_) = evaluate.held_out(processor, 1, video=True)
    rows = evaluate.evaluate(model, processor, [batch], ["holitom"], [0.05], rounds=1)
    assert [row.method for row in rows] == ["all tokens", "holitom", "random", "uniform"]
    with zoo.apply(model, "holitom", keep=0.05) as handle, torch.no_grad():
        model(**batch.alone(0))
    assert len(set(handle.last.counts)) > 1
    assert [row.tokens for row in rows] == [8 * 256, sum(handle.last.counts), 8 * 13, 8 * 13]


# Each method against its formula.


class Oracle:
    """What the references need of one model and batch, from an eager float64 copy of the model."""

    def __init__(self, tower: str = "clip", layers: int = 4, seed: int = 0):
        self.model = tiny.llava(seed, tower=tower, grid=GRID, vision_layers=layers)
        self.batch = scenes(PROMPTS, seed, "right")
        self.exact = copy.deepcopy(self.model).double()
        self.exact.set_attn_implementation("eager")
        self.has_cls = tower == "clip"
        self.deep = layers - 2  # hidden_states[-2] is this layer's output
        self.query, self.key = [], []
        watches = []
        for layer in self.exact.model.vision_tower.encoder.layers:
            for name, into in (("q_proj", self.query), ("k_proj", self.key)):
                hook = layer.self_attn.get_submodule(name).register_forward_hook
                watches.append(hook(lambda module, args, output, into=into: into.append(output)))
        with torch.no_grad():
            self.attention, hidden = recipes.encoder_attention(self.exact, self.batch["pixel_values"])
            for watch in watches:
                watch.remove()
            self.features = hidden[-2][:, 1:] if self.has_cls else hidden[-2]
            self.tokens = self.exact.model.multi_modal_projector(self.features)
        self.rows = [r for r, (images, _) in enumerate(PROMPTS) for _ in range(images)]
        self.videos = [slice(0, 1), slice(1, 4), slice(4, 6)]

    @torch.no_grad()
    def run(self, method: str, keep: int, **options):
        """The last run, and the visual tokens that the language model gets, float32 [all, C]."""
        seen = []
        watch = self.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with zoo.apply(self.model, method, keep=keep, **options) as handle:
            self.model(**self.batch)
        watch.remove()
        return handle.last, seen[0][handle.last.input_ids == tiny.IMAGE]

    @torch.no_grad()
    def same(self, method: str, keep: int, expected, *, features: bool = False, **options) -> None:
        """``expected``: (rows, counts, owner) of each video; rows of features pass through the projector."""
        last, tokens = self.run(method, keep, **options)
        assert last.owner.tolist() == [line for _, _, owner in expected for line in owner]
        assert last.counts == [count for _, counts, _ in expected for count in counts]
        rows = torch.stack([row for rows, _, _ in expected for row in rows])
        rows = self.exact.model.multi_modal_projector(rows) if features else rows
        torch.testing.assert_close(tokens.double(), rows, rtol=1e-3, atol=1e-3 * float(rows.abs().max()))

    def each_image(self, reference):
        """``reference`` (image -> rows, owner) of methods that look at one image, as the videos of a prompt."""
        results = []
        for video in self.videos:
            rows, counts, owners = [], [], []
            for image in range(video.start, video.stop):
                its_rows, its_owner = reference(image)
                owners.append([row if row < 0 else row + len(rows) for row in its_owner])
                rows += its_rows
                counts.append(len(its_rows))
            results.append((rows, counts, owners))
        return results


@pytest.fixture(scope="module")
def oracle():
    return Oracle()


@pytest.fixture(scope="module")
def siglip():
    return Oracle("siglip", seed=1)


@pytest.mark.parametrize("keep", [1, 2, 5, 8, 11])
def test_aim(oracle, keep):
    oracle.same("aim", keep, oracle.each_image(lambda i: merging_after.aim(oracle.tokens[i], keep)))


@pytest.mark.parametrize("keep, threshold, cell", [(4, 1.0, 2), (9, 1.1, 2.5), (4, 50, 1.5), (1, 1.0, 3)])
@pytest.mark.parametrize("tower", ["oracle", "siglip"])
def test_vflowopt(tower, keep, threshold, cell, request):
    oracle = request.getfixturevalue(tower)

    def reference(i):
        attention = oracle.attention[oracle.deep][i]
        return merging_after.vflowopt(oracle.tokens[i], attention, oracle.has_cls, GRID, keep, threshold, cell)

    oracle.same("vflowopt", keep, oracle.each_image(reference), threshold=threshold, cell=cell)


@pytest.mark.parametrize("trained", [False, True])
def test_sit(oracle, trained):
    slimming = TokenSlimming(32, 6)
    for parameter in slimming.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if not trained:
        # Fresh weights: drawn from the seed, and nothing from the global generator.
        torch.manual_seed(0)
        first = oracle.run("sit", 6, seed=3)[1]
        state = torch.get_rng_state()
        assert torch.equal(first, oracle.run("sit", 6, seed=3)[1])
        assert not torch.equal(first, oracle.run("sit", 6, seed=4)[1])
        assert torch.equal(state, torch.get_rng_state())
        return
    weights = {name: parameter.detach().double() for name, parameter in slimming.named_parameters()}
    expected = oracle.each_image(lambda i: merging_after.sit(oracle.features[i], weights))
    oracle.same("sit", 6, expected, features=True, slimming=slimming)
    with pytest.raises(ValueError, match=r"sit: expected slimming to give weights \[images, n, keep\]"):
        oracle.run("sit", 7, slimming=slimming)


@pytest.mark.parametrize("keep", [2, 9, 15])
@pytest.mark.parametrize("given", [False, True])
def test_recoverable_compression(oracle, keep, given):
    text = torch.randn(6, N, generator=torch.Generator().manual_seed(1)) ** 3 / 30
    query, key = oracle.query[-1], oracle.key[-1]
    attention = (query[:, :1] @ key.transpose(1, 2) / 32**0.5).softmax(-1)[:, 0, 1:]
    if not given:
        embed = oracle.exact.get_input_embeddings()
        for image, row in enumerate(oracle.rows):
            ids = oracle.batch["input_ids"][row]
            words = embed(ids[(ids > 2) & (ids != tiny.IMAGE)]).mean(0)
            text[image] = (cosine_similarity(oracle.tokens[image], words, dim=-1) / 32**0.5).detach()

    def reference(i):
        return merging_after.recoverable_compression(
            oracle.features[i], attention[i].tolist(), text[i].tolist(), key[i, 1:], keep
        )

    expected = oracle.each_image(reference)
    options = {"text": lambda ctx: text} if given else {}
    oracle.same("recoverable_compression", keep, expected, features=True, **options)


@pytest.mark.parametrize("keep, kept", [(6, 6), (23, 22), (25, 25), (60, 26)])
def test_recoverable_compression_clusters(keep, kept):
    """Scores with outliers in every step: 22 main tokens, 3 centres and the residual, where the budget allows."""
    draw = torch.Generator().manual_seed(1)
    x, keys = torch.randn(2, 80, 6, generator=draw)
    attention, text = -torch.rand(2, 80, generator=draw).log() / 80
    rows, owner = recoverable_compression._compress(x, attention, text, normalize(keys, dim=-1), keep)
    expected, expected_owner = merging_after.recoverable_compression(
        x.double(), attention.tolist(), text.tolist(), keys.double(), keep
    )
    assert owner.tolist() == expected_owner and len(rows) == kept and (-1 in expected_owner) == (kept < 24)
    torch.testing.assert_close(rows.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n, k", [(1, 20), (2, 20), (9, 20), (40, 5), (300, 20)])
def test_outlier_share(n, k):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)) ** 3
    expected = 0
    if n > 1:
        expected = (LocalOutlierFactor(min(k, n - 1)).fit_predict(values[:, None].double().numpy()) == -1).sum()
    assert recoverable_compression.outlier_share(values, k) * n == pytest.approx(expected)
    assert merging_after.outliers(values.tolist(), k) == expected


@pytest.mark.parametrize("score", ["gaussian", "dual_anchor"])
@pytest.mark.parametrize("keep", [1, 6])
def test_stc_pruner(oracle, score, keep):
    last, _ = oracle.run("stc_pruner", keep, score=score)
    kept = [frame for video in oracle.videos for frame in merging_after.stc_pruner(oracle.tokens[video], keep, score)]
    assert last.indices.tolist() == kept


@pytest.mark.parametrize("keep, share", [(1, 0.125), (5, 0.125), (9, 0.4), (8, 1.0), (6, 0.0)])
def test_visiondrop(oracle, keep, share):
    def reference(i):
        keys = oracle.key[oracle.deep][i, 1:].unflatten(-1, (4, -1)).transpose(0, 1)
        return merging_after.visiondrop(oracle.features[i], oracle.attention[oracle.deep][i], keys, keep, share)

    oracle.same("visiondrop", keep, oracle.each_image(reference), features=True, contextual=share)


def likeness(oracle) -> torch.Tensor:
    """Cosines of the same patch in adjacent frames, sorted."""
    pairs = [cosine_similarity(oracle.tokens[v][:-1], oracle.tokens[v][1:], dim=-1).flatten() for v in oracle.videos]
    return torch.cat(pairs).sort().values


@pytest.mark.parametrize("keep, contextual, beta", [(2, 0.0, 0.6), (6, 0.5, 0.6), (9, 1.0, None), (12, 0.3, 0.6)])
@pytest.mark.parametrize("tower", ["oracle", "siglip"])
def test_holitom(tower, keep, contextual, beta, request):
    oracle = request.getfixturevalue(tower)
    alike = likeness(oracle)
    tau = float(alike[len(alike) * 2 // 5 : len(alike) * 2 // 5 + 2].mean())  # between two, that none is near it
    received = [recipes.received(image, oracle.has_cls) for image in oracle.attention[oracle.deep]]
    expected = [
        merging_after.holitom(oracle.tokens[v], received[v.start : v.stop], keep, tau, beta, contextual)
        for v in oracle.videos
    ]
    lines = [line for _, _, owner in expected for line in owner]
    assert any(set(a) & set(b) - {-1} for a, b in itertools.pairwise(lines[1:4]))  # frames share tokens
    oracle.same("holitom", keep, expected, tau=tau, beta=beta, contextual=contextual)


@pytest.mark.parametrize("keep", [1, 4, 15])
def test_bvllm(oracle, keep):
    describe = [oracle.tokens[v].mean(1) for v in oracle.videos]
    alike = sorted(
        float(cosine_similarity(x[i], x[j], dim=0)) for x in describe for i in range(len(x)) for j in range(i)
    )
    for low, high in itertools.pairwise(alike):
        threshold = ((low + high) / 2 + 1) / 2
        expected = [merging_after.bvllm(oracle.tokens[v], keep, threshold) for v in oracle.videos]
        oracle.same("bvllm", keep, expected, threshold=threshold)
    alone = [merging_after.bvllm(oracle.tokens[v], keep, 1.0) for v in oracle.videos]
    oracle.same("bvllm", keep, alone, threshold=1.0)
    joined = oracle.run("bvllm", keep, threshold=0.0, descriptor=lambda frames: frames[:, 0])[0]
    assert [count > 0 for count in joined.counts] == [True, True, False, False, True, False]


@pytest.mark.parametrize(
    "keep, options", [(3, {}), (8, {"frames": 1}), (4, {"frames": 3, "rows": "mean"}), (3, {"algorithm": "spectral"})]
)
def test_centerclip(oracle, keep, options):
    sigma = 6.0 if "algorithm" in options else None
    length, rows = options.get("frames", 2), options.get("rows", "medoid")
    expected = [merging_after.centerclip(oracle.features[v], keep, length, rows, sigma) for v in oracle.videos]
    oracle.same("centerclip", keep, expected, features=True, **options, **({"sigma": sigma} if sigma else {}))


def test_holitom_inner_merge():
    hidden = torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(3))
    kept = torch.tensor([[0, 4, 5], [2, 7, 10]])
    expected = [merging_after.fold_dropped(x.double(), k.tolist()) for x, k in zip(hidden, kept, strict=True)]
    torch.testing.assert_close(holitom.fold_dropped(hidden, kept).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "mode, selective", [("averaged", True), ("pivotal", True), ("weighted", True), ("weighted", False)]
)
def test_lookm_merge(mode, selective):
    draw = torch.Generator().manual_seed(4)
    key, value = torch.randn(2, 2, 3, 12, 5, generator=draw)
    kept = torch.rand(2, 3, 12, generator=draw).argsort(-1)[..., :4].sort(-1).values
    merged = lookm.merge_evicted(key, value, kept, mode, selective=selective)
    for batch in range(2):
        exact = key[batch].double(), value[batch].double()
        expected = merging_after.merge_evicted(*exact, kept[batch].tolist(), mode, selective)
        for part, right in zip(merged, expected, strict=True):
            torch.testing.assert_close(part[batch].double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "mode, expected", [("averaged", (0.8, 1.4 / 3)), ("pivotal", (0.9, 0.7 / 3)), ("weighted", (2 / 3, 0.32))]
)
def test_lookm_golden(mode, expected):
    key = torch.tensor([[[[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]]])
    merged, _ = lookm.merge_evicted(key, key, torch.tensor([[[0]]]), mode, selective=False)
    torch.testing.assert_close(merged[0, 0, 0], torch.tensor(expected))
    with pytest.raises(ValueError, match="lookm: expected mode to be one of averaged, pivotal, weighted"):
        lookm.merge_evicted(key, key, torch.tensor([[[0]]]), "mean")


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("vflowopt", {"cell": 0.5}, "expected threshold >= 0 and cell >= 1"),
        ("stc_pruner", {"score": "mean"}, "expected score to be one of gaussian, dual_anchor"),
        ("visiondrop", {"contextual": 1.5}, r"expected contextual in \[0, 1\], got 1.5"),
        ("holitom", {"contextual": -1}, r"expected contextual in \[0, 1\], got -1"),
        ("holitom", {"max_window": 0}, "expected max_window >= 1, got 0"),
        ("bvllm", {"threshold": 2}, r"expected threshold in \[0, 1\], got 2"),
        ("centerclip", {"rows": "sum"}, "expected rows to be one of medoid, mean"),
        ("centerclip", {"frames": 0}, "expected frames >= 1 and sigma > 0"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(ValueError, match=f"{method}: {message}"):
        zoo.make_recipe(method, **options)
