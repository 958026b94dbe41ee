from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.merge_data import drop_some, exact_metric
from tests.reference import nearest_match as reference
from vtkernels.testing.compare import assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DISTANCES = ["cosine", "euclidean"]
# Dots are float32 sums: a few units of 2^-24 of the product of the norms.
DOT_ERROR = 2e-6
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pick(random, batch, count, kept):
    return torch.rand(batch, count, generator=random).argsort(-1)[:, :kept]


def match(backend, metric, centers, valid=None, distance="cosine"):
    valid = None if valid is None else backend.put(valid)
    owner, similarity = backend.ops.nearest_match(*backend.put(metric, centers), valid=valid, distance=distance)
    assert owner.dtype == torch.int64 and similarity.dtype == torch.float32
    return owner.cpu(), similarity.cpu()


def check_exact(backend, metric, centers, valid=None, distance="cosine"):
    """For metrics whose similarities are exact in float32."""
    owner, similarity = match(backend, metric, centers, valid, distance)
    expected, best = reference.nearest_match(metric, centers, valid, distance)
    assert owner.tolist() == expected.tolist()
    torch.testing.assert_close(similarity.double(), best, rtol=0, atol=1e-30, equal_nan=True)


def check_near(backend, metric, centers, valid=None, distance="cosine"):
    """For any metric: every center is as good as the best, up to rounding."""
    owner, similarity = match(backend, metric, centers, valid, distance)
    expected, best = reference.nearest_match(metric, centers, valid, distance)
    scale = 1.0 if distance == "cosine" else 4 * max([1.0, *metric.double().square().sum(-1).flatten().tolist()])
    torch.testing.assert_close(similarity.double(), best, rtol=0, atol=DOT_ERROR * scale)
    assert torch.equal(owner < 0, expected < 0)
    for b in range(metric.shape[0]):
        table = reference.similarities(metric[b], distance)
        for n in ((owner[b] >= 0) & (owner[b] != expected[b])).nonzero()[:, 0].tolist():
            assert table[n, centers[b, owner[b, n]]] >= best[b, n] - 2 * DOT_ERROR * scale


def test_golden(backend):
    """LOOK-M's two evicted keys go to the first of two kept ones."""
    metric = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]]])
    owner, similarity = match(backend, metric, torch.tensor([[0, 3]]))
    assert owner.tolist() == [[0, 0, 0, 1]]
    assert similarity[0].tolist() == pytest.approx([1.0, 0.6, 0.8, 1.0])
    owner, similarity = match(backend, metric, torch.tensor([[3, 0]]), distance="euclidean")
    assert owner.tolist() == [[1, 1, 1, 0]]
    assert similarity[0].tolist() == pytest.approx([0.0, -0.8, -0.4, 0.0], abs=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("count", "kept"), [(1, 1), (5, 1), (7, 3), (64, 63), (65, 64), (131, 4), (130, 67), (90, 90)])
def test_exact_ties(backend, random, count, kept, dtype, distance):
    metric = exact_metric(random, 2, count, 18).to(dtype)
    check_exact(backend, metric, pick(random, 2, count, kept), distance=distance)


@QUICK
@given(data=st.data())
def test_any_shape(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, count, width = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 80), (1, 40)))
    centers = pick(random, batch, count, data.draw(st.integers(0, count)))
    valid = None
    if data.draw(st.booleans()):
        centers[drop_some(random, *centers.shape)] = -1
    if data.draw(st.booleans()):
        valid = drop_some(random, batch, count, 0.8)
        for b in range(batch):
            valid[b, centers[b][centers[b] >= 0]] = True
    distance = data.draw(st.sampled_from(DISTANCES))
    if data.draw(st.booleans()):
        check_exact(backend, exact_metric(random, batch, count, width), centers, valid, distance)
    else:
        dtype = data.draw(st.sampled_from(FLOATS))
        metric = torch.randn(batch, count, width, generator=random).to(dtype)
        check_near(backend, metric, centers, valid, distance)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [63, 64, 129, 257])
def test_widths(backend, random, width, dtype, distance):
    metric = torch.randn(1, 75, width, generator=random).to(dtype)
    check_near(backend, metric, pick(random, 1, 75, 13), distance=distance)


def test_more_centers_than_a_pass(backend, random):
    """More than one block of the CUDA kernel streams and than the CPU takes in one pass, and several CPU blocks."""
    count, kept, width = (420, 300, 8) if backend.name == "simt" else (700, 301, 512)
    check_near(backend, torch.randn(1, count, width, generator=random), pick(random, 1, count, kept))
    wide = torch.randn(1, 40 if backend.name == "simt" else 90, 5000, generator=random).bfloat16()
    check_near(backend, wide, pick(random, 1, wide.shape[1], 19), distance="euclidean")


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_and_opposite_tokens(backend, distance):
    centers = torch.tensor([[70, 3, 4, 139]])
    check_exact(backend, torch.ones(1, 140, 16), centers, distance=distance)  # everything ties: all into token 70
    sign = torch.where(torch.arange(140) % 3 == 0, 1.0, -1.0)[None, :, None]
    check_exact(backend, sign * torch.ones(1, 140, 16), centers, distance=distance)


def special(random):
    metric = exact_metric(random, 1, 40, 16)
    metric[0, 2] = 0.0  # a zero vector
    metric[0, 3] = 1e-30  # its squared norm is no float32: counts as one
    metric[0, 4, 1] = math.nan
    metric[0, 9, 0] = math.inf
    metric[0, 13] = 1e30  # norm beyond float32
    metric[0, 18] = -math.inf
    metric[0, 17] = math.nan
    return metric


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("centers", [[9, 0, 1], [2, 3, 5], [4, 17, 18], [30, 13, 2, 4, 20]])
def test_special_values(backend, random, centers, distance):
    """Also as centers; where all centers are NaN, the first one is taken."""
    check_exact(backend, special(random), torch.tensor([centers]), distance=distance)


def test_distances_are_not_positive(backend, random):
    """A copy of a center is at distance 0, up to the rounding of the squared norms."""
    metric = torch.randn(1, 30, 100, generator=random) * 100
    metric = metric[:, torch.arange(30) % 10]
    owner, similarity = match(backend, metric, torch.arange(10)[None], distance="euclidean")
    assert owner.tolist() == [[n % 10 for n in range(30)]]
    assert (similarity <= 0).all() and (similarity >= -10).all()  # of squared norms of a million


def test_no_center(backend, random):
    for centers in (torch.zeros(2, 0, dtype=torch.int64), torch.full((2, 3), -1)):
        owner, similarity = match(backend, torch.randn(2, 7, 4, generator=random), centers)
        assert (owner == -1).all() and (similarity == -math.inf).all()
    assert match(backend, torch.zeros(2, 0, 4), torch.full((2, 3), -1))[0].shape == (2, 0)


def test_batch_rows_with_fewer_centers(backend, random):
    metric = torch.randn(2, 20, 8, generator=random)
    centers = torch.tensor([[3, 11, 7], [-1, 5, -1]])
    owner, _ = match(backend, metric, centers)
    assert owner[0].unique().tolist() == [0, 1, 2] and (owner[1] == 1).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views(backend, random, dtype):
    metric = torch.randn(70, 3, 40, generator=random).to(dtype).transpose(0, 1)[:, 1:69:2, 3:36]
    centers, valid = pick(random, 3, 34, 9).t().contiguous().t(), ~drop_some(random, 34, 3).t()
    valid = valid.scatter(1, centers, True).t().contiguous().t()
    check_near(backend, metric, centers, valid)
    wide, same = metric[:1].expand(3, -1, -1), centers[:1].expand(3, -1)
    assert_same_bits(match(backend, wide, same)[1], match(backend, wide.contiguous(), same.contiguous())[1])


def test_batch_rows_do_not_mix(backend, random):
    metric, centers = torch.randn(5, 60, 33, generator=random), pick(random, 5, 60, 11)
    owner, similarity = match(backend, metric, centers)
    for b in range(5):
        alone = match(backend, metric[b : b + 1], centers[b : b + 1])
        assert_same_bits(alone[0], owner[b : b + 1])
        assert_same_bits(alone[1], similarity[b : b + 1])


def test_same_bits_for_any_thread_count(random):
    metric, centers = torch.randn(3, 700, 200, generator=random).bfloat16(), pick(random, 3, 700, 70)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(torch.ops.vtk.nearest_match(metric, centers))
    for other in results[1:]:
        assert_same_bits(other[0], results[0][0])
        assert_same_bits(other[1], results[0][1])


def test_no_gradient(random):
    metric = torch.randn(1, 8, 4, generator=random).requires_grad_()
    assert not torch.ops.vtk.nearest_match(metric, torch.tensor([[2]]))[1].requires_grad


X, CENTERS = torch.zeros(2, 6, 3), torch.zeros(2, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(X[0], CENTERS), r"metric of shape \[B, N, C\], got \[6, 3\]"),
        (lambda op: op(X[:, :, :0], CENTERS), r"metric with at least one channel"),
        (lambda op: op(X.double(), CENTERS), r"metric of dtype float32, float16 or bfloat16, got float64"),
        (lambda op: op(X.transpose(1, 2), CENTERS), r"metric with a contiguous last dimension"),
        (lambda op: op(X, CENTERS[0]), r"centers of shape \[B, K\], got \[1\]"),
        (lambda op: op(X, CENTERS[:1]), r"centers.shape = \[B, K\] = \[2, 1\], got \[1, 1\]"),
        (lambda op: op(X, CENTERS.int()), r"centers of dtype int64, got int32"),
        (lambda op: op(X, CENTERS, distance="l1"), r'distance to be "cosine" or "euclidean", got "l1"'),
        (lambda op: op(X, CENTERS, valid=torch.ones(2, 5).bool()), r"valid.shape = \[B, N\] = \[2, 6\]"),
        (lambda op: op(X, CENTERS, valid=torch.ones(2, 6)), r"valid of dtype bool"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::nearest_match.*" + message):
        call(backend.ops.nearest_match)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (6, r"-1 <= centers < N = 6, got centers\[0, 1\] = 6"),
        (-2, r"got centers\[0, 1\] = -2"),
        (2**40, r"got centers\[0, 1\] = 1099511627776"),
        (2, r"distinct centers, got centers\[0, 1\] = centers\[0, 0\] = 2"),
        (1, r"valid centers, got centers\[0, 1\] = 1 with valid\[0, 1\] = False"),
    ],
)
def test_centers_that_are_none(backend, random, bad, message):
    metric, valid = torch.randn(1, 6, 3, generator=random), torch.tensor([[True, False, True, True, True, True]])
    centers = torch.tensor([[2, bad, 4]])
    if backend.checks_values:
        with pytest.raises(RuntimeError, match="vtk::nearest_match.*" + message):
            match(backend, metric, centers, valid)
    else:
        expected = match(backend, metric, torch.tensor([[2, -1, 4]]), valid)
        for out, same in zip(match(backend, metric, centers, valid), expected, strict=True):
            assert_same_bits(out, same)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_graph_capture(random):
    metric, centers = torch.randn(2, 300, 64, generator=random).cuda(), pick(random, 2, 300, 40).cuda()
    graph = torch.cuda.CUDAGraph()
    torch.ops.vtk.nearest_match(metric, centers)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        owner, _ = torch.ops.vtk.nearest_match(metric, centers)
    metric.copy_(torch.randn(2, 300, 64, generator=random))
    graph.replay()
    assert_same_bits(owner, torch.ops.vtk.nearest_match(metric, centers)[0])
