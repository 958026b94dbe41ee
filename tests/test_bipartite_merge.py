from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.merge_data import assert_weights, drop_some, exact_metric, golden_metric, plain_merge
from tests.reference import bipartite_match as match_reference
from tests.reference import bipartite_merge as reference
from tests.reference import merge_apply as apply_reference
from vtkernels.testing.compare import assert_close, assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DOT_ERROR = 2e-6
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = torch.arange(1.0, 7.0)[None, :, None]  # tokens 1 to 6 of the golden examples


def merge(backend, tokens, metric, r, **options):
    moved = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    merged, size, owner = backend.ops.bipartite_merge(*backend.put(tokens, metric), r, **moved)
    assert merged.dtype == tokens.dtype and size.dtype == torch.float32 and owner.dtype == torch.int64
    return merged.cpu(), size.cpu(), owner.cpu()


def check(backend, tokens, metric, r, size=None, protect=None, order="position"):
    """For metrics whose similarities are exact in float32."""
    merged, sizes, owner = merge(backend, tokens, metric, r, size=size, protect=protect, order=order)
    expected, expected_sizes, expected_owner = reference.bipartite_merge(tokens, metric, r, size, protect, order)
    assert owner.tolist() == expected_owner.tolist()
    assert_close(merged, expected, plain_merge(tokens, owner, merged.shape[1], size))
    assert_weights(sizes, expected_sizes)


def test_golden(backend):
    """ToMe's matching on six vectors, in its order and by position."""
    merged, size, owner = merge(backend, VALUES, golden_metric(), 2, order="tome")
    assert merged.flatten().tolist() == [5, 1.5, 3.5, 6] and size.tolist() == [[1, 2, 2, 1]]
    assert owner.tolist() == [[1, 1, 2, 2, 0, 3]]
    merged, size, _ = merge(backend, VALUES, golden_metric(), 3, order="tome")
    assert merged.flatten().tolist() == [1.5, 4, 6] and size.tolist() == [[2, 3, 1]]
    merged, size, _ = merge(backend, VALUES, golden_metric(), 2)
    assert merged.flatten().tolist() == [1.5, 3.5, 5, 6] and size.tolist() == [[2, 2, 1, 1]]


@pytest.mark.parametrize("order", ["position", "tome"])
def test_golden_with_a_class_token(backend, order):
    protect = torch.tensor([[True] + [False] * 5])
    merged, size, owner = merge(backend, VALUES, golden_metric(), 2, protect=protect, order=order)
    assert merged.flatten().tolist() == [1, 2, 4, 6] and size.tolist() == [[1, 1, 3, 1]]
    assert owner.tolist() == [[0, 1, 2, 2, 2, 3]]


def test_golden_unmerge(backend):
    merged, _, owner = merge(backend, VALUES, golden_metric(), 2, order="tome")
    out = backend.ops.unmerge(*backend.put(merged, owner))
    assert out.flatten().tolist() == [1.5, 1.5, 3.5, 3.5, 5, 6]


def test_sizes_accumulate(backend):
    """Two merges in a row give the mean over the original tokens."""
    merged, size, _ = merge(backend, VALUES, golden_metric(), 2)
    metric = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0, 1]]])
    merged, size, second = merge(backend, merged, metric, 2, size=size)
    assert second.tolist() == [[0, 0, 1, 1]] and size.tolist() == [[4, 2]]
    assert merged.flatten().tolist() == [2.5, 5.5]


@QUICK
@given(data=st.data())
def test_any_shape(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, count, width, channels = (data.draw(st.integers(*span)) for span in ((0, 3), (0, 70), (0, 40), (1, 30)))
    dtype = data.draw(st.sampled_from(FLOATS))
    tokens = torch.randn(batch, count, width, generator=random).to(dtype)
    metric = exact_metric(random, batch, count, channels).to(data.draw(st.sampled_from(FLOATS)))
    protect = drop_some(random, batch, count) if data.draw(st.booleans()) else None
    size = torch.randint(1, 6, (batch, count), generator=random).float() if data.draw(st.booleans()) else None
    r = data.draw(st.integers(0, count + 1))
    if not backend.checks_values:
        r = reference.merges(count, r, protect)
    check(backend, tokens, metric, r, size, protect, data.draw(st.sampled_from(["position", "tome"])))


@pytest.mark.parametrize("dtype", FLOATS)
def test_random_metrics(backend, random, dtype):
    """What is merged is consistent with the owner map, and that with the similarities up to rounding."""
    tokens, metric = (torch.randn(2, 150, width, generator=random).to(dtype) for width in (24, 72))
    merged, size, owner = merge(backend, tokens, metric, 40)
    expected, expected_size = apply_reference.merge_apply(tokens, owner, 110)
    assert_close(merged, expected, plain_merge(tokens, owner, 110))
    assert torch.equal(size.double(), expected_size)
    for b in range(2):
        assert match_reference.worst_regret(metric[b], owner[b], 40) <= 2 * DOT_ERROR


def test_composition(backend, random):
    """One call is the two ops, bit by bit."""
    tokens, metric = backend.put(torch.randn(2, 90, 40, generator=random), torch.randn(2, 90, 16, generator=random))
    size = backend.put(torch.rand(2, 90, generator=random) + 0.5)
    merged, sizes, owner = backend.ops.bipartite_merge(tokens, metric, 30, size=size)
    assert_same_bits(owner, backend.ops.bipartite_match(metric, 30)[0])
    again = backend.ops.merge_apply(tokens, owner, 60, weight=size)
    assert_same_bits(merged, again[0])
    assert_same_bits(sizes, again[1])


def test_tome_order_is_a_permutation_of_position_order(backend, random):
    tokens, metric = torch.randn(1, 101, 8, generator=random), torch.randn(1, 101, 16, generator=random)
    by_position, _, owner = merge(backend, tokens, metric, 30)
    as_tome, _, tome_owner = merge(backend, tokens, metric, 30, order="tome")
    for n in range(101):
        assert torch.equal(by_position[0, owner[0, n]], as_tome[0, tome_owner[0, n]])
    assert tome_owner[0, 1::2].tolist() == list(range(21, 71))


def test_nothing_to_merge(backend, random):
    tokens = torch.randn(2, 9, 5, generator=random)
    for count, r in ((9, 0), (1, 3)):
        merged, size, owner = merge(backend, tokens[:, :count], tokens[:, :count], r)
        assert_same_bits(merged, tokens[:, :count].contiguous())
        assert (size == 1).all() and owner.tolist() == [list(range(count))] * 2


def test_more_merges_than_protect_allows(backend):
    """The CPU clamps r; CUDA keeps the promised length and drops tokens of even position that cannot merge."""
    metric = golden_metric().expand(2, -1, -1)
    protect = torch.tensor([[True, False, True, False, False, False], [True] * 6])
    if backend.checks_values:
        merged, size, owner = merge(backend, VALUES, golden_metric(), 3, protect=protect[:1])
        assert merged.flatten().tolist() == [1, 2, 3, 4.5, 6] and owner.tolist() == [[0, 1, 2, 3, 3, 4]]
        merged, _, _ = merge(backend, VALUES.expand(2, -1, -1), metric, 3, protect=protect)
        assert merged[:, :, 0].tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    else:
        merged, size, owner = merge(backend, VALUES.expand(2, -1, -1), metric, 2, protect=protect)
        assert merged[:, :, 0].tolist() == [[2, 3, 4.5, 6], [2, 4, 5, 6]]
        assert owner.tolist() == [[-1, 0, 1, 2, 2, 3], [-1, 0, -1, 1, 2, 3]]
        assert size.tolist() == [[1, 1, 2, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views(backend, random, dtype):
    tokens = torch.randn(30, 3, 40, generator=random).to(dtype).transpose(0, 1)[:, 1:29:2, 3:36]
    metric = exact_metric(random, 3, 28, 30).to(dtype)[:, ::2, 5:21]
    size = torch.randint(1, 4, (14, 3), generator=random).float().t()
    check(backend, tokens, metric, 4, size, drop_some(random, 14, 3, 0.1).t())


def test_same_bits_for_any_thread_count(random):
    tokens, metric = torch.randn(3, 700, 96, generator=random), torch.randn(3, 700, 72, generator=random)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.vtk.bipartite_merge(tokens, metric, 200))
    for other in results[1:]:
        for one, another in zip(other, results[0], strict=True):
            assert_same_bits(one, another)


def test_gradient(random):
    tokens, metric = torch.randn(2, 15, 6, generator=random), exact_metric(random, 2, 15, 8)
    size, upstream = torch.rand(2, 15, generator=random) + 0.5, torch.randn(2, 10, 6, generator=random)
    ours, exact = tokens.clone().requires_grad_(), tokens.double().requires_grad_()
    merged, sizes, _ = torch.ops.vtk.bipartite_merge(ours, metric.requires_grad_(), 5, size=size)
    assert not sizes.requires_grad
    (merged * upstream).sum().backward()
    (reference.bipartite_merge(exact, metric.detach(), 5, size)[0] * upstream).sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)
    assert metric.grad is None


def test_compiles_whole(random):
    def block(tokens, keys, size):
        merged, size, owner = torch.ops.vtk.bipartite_merge(tokens * 2, keys.mean(1), 4, size=size)
        return merged + size.log()[..., None], owner

    tokens, keys = torch.randn(2, 12, 6, generator=random).requires_grad_(), torch.randn(2, 3, 12, 5, generator=random)
    args = (tokens, keys, torch.ones(2, 12))
    out, owner = torch.compile(block, fullgraph=True, backend="aot_eager")(*args)
    assert owner.tolist() == block(*args)[1].tolist() and out.shape == (2, 8, 6)
    out.sum().backward()
    assert (tokens.grad != 0).all()


X = torch.zeros(2, 6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(X, X, -1), r"r >= 0, got r = -1"),
        (lambda op: op(X[0], X, 1), r"tokens of shape \[B, N, D\], got \[6, 3\]"),
        (lambda op: op(X, X[:, 1:], 1), r"metric of shape \[B, N, C\] with \[B, N\] = \[2, 6\], got \[2, 5, 3\]"),
        (lambda op: op(X, X.long(), 1), r"metric of dtype float32, float16 or bfloat16, got int64"),
        (lambda op: op(X.transpose(1, 2), X, 1), r"tokens with a contiguous last dimension"),
        (lambda op: op(X, X, 1, size=X), r"size.shape = \[B, N\] = \[2, 6\], got \[2, 6, 3\]"),
        (lambda op: op(X, X, 1, protect=torch.zeros(2, 6)), r"protect of dtype bool"),
        (lambda op: op(X, X, 1, order="score"), r'order to be "position" or "tome", got "score"'),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::bipartite_merge.*" + message):
        call(backend.ops.bipartite_merge)


@pytest.mark.parametrize("bad", [0.0, -2.0, float("nan"), float("inf")])
def test_sizes_that_are_none(bad):
    size = torch.ones(2, 6)
    size[1, 3] = bad
    with pytest.raises(RuntimeError, match=r"vtk::bipartite_merge: expected size > 0 and finite, got size\[1, 3\]"):
        torch.ops.vtk.bipartite_merge(X, X, 1, size=size)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_graph_capture(random):
    tokens, metric = (torch.randn(2, 300, 64, generator=random).cuda() for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    torch.ops.vtk.bipartite_merge(tokens, metric, 50)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = torch.ops.vtk.bipartite_merge(tokens, metric, 50)
    metric.copy_(torch.randn(2, 300, 64, generator=random))
    graph.replay()
    for got, want in zip(outputs, torch.ops.vtk.bipartite_merge(tokens, metric, 50), strict=True):
        assert_same_bits(got, want)
