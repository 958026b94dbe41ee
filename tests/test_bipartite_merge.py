from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.merge_data import (
    assert_weights,
    bounds,
    counts,
    drop_some,
    exact_metric,
    golden_metric,
    on_the_circle,
    plain_merge,
)
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


# Packed segments.


def merge_varlen(backend, tokens, metric, cu_seqlens, r, **options):
    moved = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    outputs = backend.ops.bipartite_merge.varlen(*backend.put(tokens, metric, cu_seqlens, r), **moved)
    assert [t.dtype for t in outputs] == [tokens.dtype, torch.float32, torch.int64, torch.int32]
    return [t.cpu() for t in outputs]


def check_varlen(backend, tokens, metric, cu_seqlens, r, size=None, **options):
    """For metrics whose similarities are exact in float32."""
    merged, sizes, owner, cu_merged = merge_varlen(backend, tokens, metric, cu_seqlens, r, size=size, **options)
    expected, expected_sizes, expected_owner, expected_cu = reference.bipartite_merge_varlen(
        tokens, metric, cu_seqlens, r, size, **options
    )
    assert owner.tolist() == expected_owner.tolist() and cu_merged.tolist() == expected_cu.tolist()
    plain = plain_merge(tokens[None], owner[None], merged.shape[0], None if size is None else size[None])[0]
    assert_close(merged, expected, plain)
    assert_weights(sizes, expected_sizes)


def test_varlen_golden(backend):
    """The golden example twice, with r 2 and 3, and a segment of one token between them."""
    metric = torch.cat([golden_metric()[0], torch.ones(1, 2), golden_metric()[0]])
    tokens = torch.cat([VALUES[0], torch.full((1, 1), 9.0), VALUES[0]])
    merged, size, owner, cu_merged = merge_varlen(
        backend, tokens, metric, bounds([6, 0, 1, 6]), counts(2, 1, 1, 3), order="tome"
    )
    assert merged[:, 0].tolist() == [5, 1.5, 3.5, 6, 9, 1.5, 4, 6]
    assert size.tolist() == [1, 2, 2, 1, 1, 2, 3, 1] and cu_merged.tolist() == [0, 4, 4, 5, 8]
    assert owner.tolist() == [1, 1, 2, 2, 0, 3, 4, 5, 5, 6, 6, 6, 7]


def test_varlen_causal(backend):
    """B-VLLM: a kept row is the mean of itself and its direct children, what follows a merged one is dropped."""
    metric = on_the_circle([0.0, 30.0, 50.0, 200.0, 190.0])[0]
    tokens = torch.arange(1.0, 6.0)[:, None]
    cu, r = bounds([5]), counts(5)
    merged, size, owner, _ = merge_varlen(backend, tokens, metric, cu, r, split="causal", threshold=0.5)
    assert merged[:, 0].tolist() == [1.5, 4.5] and size.tolist() == [2, 2] and owner.tolist() == [0, 0, -1, 1, 1]


@QUICK
@given(data=st.data())
def test_varlen_any_shape(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 16, 35]), max_size=6))
    r = counts(*(data.draw(st.integers(0, length + 1)) for length in lengths))
    total, width = sum(lengths), data.draw(st.integers(0, 40))
    tokens = torch.randn(total, width, generator=random).to(data.draw(st.sampled_from(FLOATS)))
    metric = exact_metric(random, 1, total, 12)[0].to(data.draw(st.sampled_from(FLOATS)))
    protect = drop_some(random, 1, total)[0] if data.draw(st.booleans()) else None
    size = torch.randint(1, 6, (total,), generator=random).float() if data.draw(st.booleans()) else None
    split, order = data.draw(st.sampled_from([("even_odd", "position"), ("even_odd", "tome"), ("causal", "position")]))
    check_varlen(
        backend, tokens, metric, bounds(lengths), r, size, protect=protect, split=split, order=order,
        threshold=data.draw(st.sampled_from([None, 0.25])), out_len=data.draw(st.sampled_from([None, total])),
    )  # fmt: skip


def test_varlen_long_segments(backend, random):
    """More tokens than merge_apply lists at once; strided tokens, metric and sizes."""
    lengths = [400, 3, 300]
    tokens = torch.randn(703, 20, generator=random)[:, 3:14]
    metric = torch.nn.functional.pad(exact_metric(random, 1, 703, 20)[0], (7, 3))[:, 7:27]
    size = torch.randint(1, 4, (703, 2), generator=random).float()[:, 1]
    check_varlen(backend, tokens, metric, bounds(lengths), counts(190, 1, 0), size)


def test_varlen_is_the_dense_op(backend, random):
    """Equal segments are a batch, bit by bit."""
    tokens, metric = torch.randn(2, 50, 24, generator=random), torch.randn(2, 50, 16, generator=random)
    expected = merge(backend, tokens, metric, 20, order="tome")
    flat = [x.reshape(100, -1) for x in (tokens, metric)]
    merged, size, owner, _ = merge_varlen(backend, *flat, bounds([50, 50]), counts(20, 20), order="tome")
    assert_same_bits(merged.reshape(2, 30, 24), expected[0])
    assert_same_bits(size.reshape(2, 30), expected[1])
    assert_same_bits(owner.reshape(2, 50), expected[2] + torch.tensor([[0], [30]]))


def test_varlen_out_len(backend):
    """Rows to spare are zeros. Too few: an error on the CPU, lost rows on CUDA, whose owners lie outside."""
    args = (VALUES[0], golden_metric()[0], bounds([6]), counts(2))
    merged, size, owner, cu_merged = merge_varlen(backend, *args, out_len=6)
    assert merged[:, 0].tolist() == [1.5, 3.5, 5, 6, 0, 0] and size.tolist() == [2, 2, 1, 1, 0, 0]
    assert cu_merged.tolist() == [0, 4]
    if backend.checks_values:
        with pytest.raises(RuntimeError, match="expected out_len >= the rows that are left, 4, got 3"):
            merge_varlen(backend, *args, out_len=3)
    else:
        merged, _, owner, cu_merged = merge_varlen(backend, *args, out_len=3)
        assert merged[:, 0].tolist() == [1.5, 3.5, 5] and owner.tolist() == [0, 0, 1, 1, 2, 3]
        assert cu_merged.tolist() == [0, 4]


def test_varlen_gradient(random):
    tokens, metric = torch.randn(21, 6, generator=random), exact_metric(random, 1, 21, 8)[0]
    size, cu, r = torch.rand(21, generator=random) + 0.5, bounds([9, 0, 12]), counts(3, 0, 5)
    ours, exact = tokens.clone().requires_grad_(), tokens.double().requires_grad_()
    merged, sizes, *_ = torch.ops.vtk.bipartite_merge.varlen(ours, metric.requires_grad_(), cu, r, size=size)
    upstream = torch.randn(13, 6, generator=random)
    assert not sizes.requires_grad
    (merged * upstream).sum().backward()
    (reference.bipartite_merge_varlen(exact, metric.detach(), cu, r, size)[0] * upstream).sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)
    assert metric.grad is None


def test_varlen_compiles_whole(random):
    def block(tokens, metric, cu, r):
        merged, size, _, cu_merged = torch.ops.vtk.bipartite_merge.varlen(tokens * 2, metric, cu, r, out_len=15)
        return merged + size[:, None], cu_merged

    args = (*(torch.randn(20, width, generator=random) for width in (6, 5)), bounds([12, 8]), counts(3, 2))
    for got, want in zip(torch.compile(block, fullgraph=True, backend="aot_eager")(*args), block(*args), strict=True):
        assert_same_bits(got, want)


X = torch.zeros(2, 6, 3)
Y, CU, R = X[0], counts(0, 2, 6), counts(1, 1)


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
        (lambda op: op.varlen(X, Y, CU, R), r"tokens of shape \[T, D\], got \[2, 6, 3\]"),
        (lambda op: op.varlen(Y, Y[1:], CU, R), r"metric of shape \[T, C\] with T = 6, got \[5, 3\]"),
        (lambda op: op.varlen(Y, Y, CU, R[:1]), r"cu_seqlens.shape = \[segments \+ 1\] = \[2\], got \[3\]"),
        (lambda op: op.varlen(Y, Y, CU, R, size=X[:, :, 0]), r"size.shape = \[T\] = \[6\], got \[2, 6\]"),
        (lambda op: op.varlen(Y, Y, CU, R, threshold=float("nan")), r"threshold to be a number"),
        (lambda op: op.varlen(Y, Y, CU, R, split="causal", order="tome"), r'order = "position" with split="causal"'),
        (lambda op: op.varlen(Y, Y, CU, R, out_len=-1), r"out_len >= 0, got -1"),
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
    with pytest.raises(RuntimeError, match=r"vtk::bipartite_merge: expected size > 0 and finite, got size\[3\]"):
        torch.ops.vtk.bipartite_merge.varlen(Y, Y, CU, R, size=size[1])


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
