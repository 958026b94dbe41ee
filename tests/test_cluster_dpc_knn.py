from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.merge_data import drop_some, exact_metric
from tests.reference import cluster_dpc_knn as reference
from vtkernels.testing.compare import assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def cluster(backend, tokens, clusters, **options):
    moved = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    centers, owner = backend.ops.cluster_dpc_knn(backend.put(tokens), clusters, **moved)
    assert centers.dtype == owner.dtype == torch.int64
    return centers.cpu(), owner.cpu()


def check(backend, tokens, clusters, **options):
    centers, owner = cluster(backend, tokens, clusters, **options)
    expected_centers, expected_owner = reference.cluster_dpc_knn(tokens, clusters, **options)
    assert centers.tolist() == expected_centers.tolist()
    assert owner.tolist() == expected_owner.tolist()


def test_two_groups_by_hand(backend):
    """k = 2. Equal densities: token 0 counts as the densest, delta 11, and 3 is 8 away from the denser ones."""
    tokens = torch.tensor([[[0.0], [1.0], [2.0], [10.0], [11.0]]])
    centers, owner = cluster(backend, tokens, 2, k=2)
    assert centers.tolist() == [[0, 3]] and owner.tolist() == [[0, 0, 0, 1, 1]]
    # k = 3: token 1 is the densest; 10 and 11 have one another and a far third, so next to no density.
    centers, owner = cluster(backend, tokens, 3, k=3)
    assert centers.tolist() == [[0, 1, 2]] and owner.tolist() == [[0, 1, 2, 2, 2]]


@QUICK
@given(
    batch=st.integers(0, 2),
    count=st.sampled_from([1, 2, 5, 17, 63, 64, 65]),
    width=st.sampled_from([1, 3, 16, 17]),
    share=st.floats(0, 1),
    k=st.sampled_from([1, 2, 7, 32]),
    seed=st.integers(0, 2**16),
)
def test_shapes_and_ties(backend, batch, count, width, share, k, seed):
    random = torch.Generator().manual_seed(seed)
    check(backend, exact_metric(random, batch, count, width), int(share * count), k=k)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_over_several_tiles(backend, dtype, random):
    check(backend, torch.randn(1, 140, 24, generator=random).to(dtype), 70)


@pytest.mark.parametrize("width", [63, 64, 65, 130, 257])
def test_depth_in_chunks(backend, width, random):
    check(backend, torch.randn(1, 12, width, generator=random), 4)


@pytest.mark.parametrize("count", [1023, 1024, 1025, 1100])
def test_with_and_without_the_matrix(count, random):
    """On both sides of the CPU's limit."""
    tokens = torch.randn(1, count, 5, generator=random)
    centers, owner = torch.ops.vtk.cluster_dpc_knn(tokens, 6)
    x = tokens[0].double()
    assert centers[0].tolist() == reference_centers(x, 6)
    assert owner[0].tolist() == (x[:, None] - x[centers[0]]).square().sum(-1).argmin(-1).tolist()


def reference_centers(x, clusters):
    """As the reference, without its loops."""
    squared = reference.squared_distances(x) / x.shape[1]
    mean = squared.sort(-1).values[:, : min(7, clusters)].mean(-1)
    delta = squared.where(mean[None] < mean[:, None], math.inf).min(-1).values
    scores = (-mean).exp() * delta.where(delta < math.inf, squared.max()).sqrt()
    return scores.topk(clusters).indices.sort().values.tolist()


def test_valid_and_counts(backend, random):
    tokens = torch.randn(4, 30, 9, generator=random)
    valid = ~drop_some(random, 4, 30)
    valid[1], valid[3, 5:] = False, False
    counts = torch.tensor([8, 8, 0, 7], dtype=torch.int32)
    check(backend, tokens, 8, valid=valid, counts=counts)
    centers, owner = cluster(backend, tokens, 8, valid=valid, counts=counts)
    assert (centers[1:3] == -1).all() and (owner[1:3] == -1).all() and (centers[3] >= 0).sum() <= 5


def test_counts_outside_are_reported_or_clamped(backend, random):
    tokens, counts = torch.randn(2, 9, 3, generator=random), torch.tensor([-1, 5], dtype=torch.int32)
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=r"0 <= counts <= clusters = 4, got counts\[0\] = -1"):
            cluster(backend, tokens, 4, counts=counts)
    else:
        centers, _ = cluster(backend, tokens, 4, counts=counts)
        assert centers[0].tolist() == [-1] * 4 and (centers[1] >= 0).all()


def test_equal_tokens(backend):
    centers, owner = cluster(backend, torch.ones(1, 70, 3), 4)
    assert centers.tolist() == [[0, 1, 2, 3]]
    assert owner[0].tolist() == [0, 1, 2, 3] + [0] * 66  # a center is its own, the others go to the lower one


def test_densities_below_float32_keep_their_rank(backend, random):
    """Mean squared distances of 1000 and more: exp(-1000) is 0, and every score would be."""
    tokens = torch.randn(1, 40, 6, generator=random) * 60
    x = tokens[0].double()
    squared = reference.squared_distances(x) / 6
    mean = squared.sort(-1).values[:, :5].mean(-1)
    delta = squared.where(mean[None] < mean[:, None], math.inf).min(-1).values
    scores = 0.5 * delta.where(delta < math.inf, squared.max()).log() - mean
    centers, _ = cluster(backend, tokens, 5)
    assert centers[0].tolist() == scores.topk(5).indices.sort().values.tolist()


def test_nan_infinity_and_huge_norms_take_no_part(backend, random):
    tokens = torch.randn(1, 30, 4, generator=random)
    tokens[0, 3, 1], tokens[0, 7, 0], tokens[0, 11] = math.nan, math.inf, 1e19
    check(backend, tokens, 5)
    assert cluster(backend, tokens, 5)[1][0, [3, 7, 11]].tolist() == [-1] * 3
    centers, owner = cluster(backend, torch.full((1, 3, 2), math.nan), 2)
    assert centers.tolist() == [[-1, -1]] and owner.tolist() == [[-1] * 3]


def test_all_tokens_are_centers(backend, random):
    centers, owner = cluster(backend, torch.randn(2, 9, 4, generator=random), 9)
    assert centers.tolist() == owner.tolist() == [list(range(9))] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_views(backend, dtype, random):
    wide = torch.randn(20, 2, 40, generator=random).to(dtype)
    for tokens in (wide.transpose(0, 1)[:, :, :24], wide.transpose(0, 1)[:, ::2, 1:22], wide[:9, :1].expand(-1, 3, -1)):
        ours, plain = cluster(backend, tokens, 3), cluster(backend, tokens.contiguous(), 3)
        assert_same_bits(ours[0], plain[0])
        assert_same_bits(ours[1], plain[1])


def test_batch_rows_do_not_mix(backend, random):
    tokens = torch.randn(3, 66, 7, generator=random)
    centers, owner = cluster(backend, tokens, 9)
    for b in range(3):
        alone = cluster(backend, tokens[b : b + 1], 9)
        assert_same_bits(alone[0], centers[b : b + 1])
        assert_same_bits(alone[1], owner[b : b + 1])


@pytest.mark.parametrize("count", [400, 1300])
def test_same_bits_for_any_thread_count(count, random):
    tokens = torch.randn(1, count, 40, generator=random).bfloat16()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.vtk.cluster_dpc_knn(tokens, 50))
    for other in results[1:]:
        assert_same_bits(other[0], results[0][0])
        assert_same_bits(other[1], results[0][1])


X = torch.zeros(2, 6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(X[0], 2), r"tokens of shape \[B, N, D\], got \[6, 3\]"),
        (lambda op: op(X[:, :, :0], 2), r"tokens with at least one channel"),
        (lambda op: op(X.double(), 2), r"tokens of dtype float32, float16 or bfloat16, got float64"),
        (lambda op: op(X.transpose(1, 2), 2), r"tokens with a contiguous last dimension"),
        (lambda op: op(X, -1), r"0 <= clusters <= N = 6, got clusters = -1"),
        (lambda op: op(X, 7), r"0 <= clusters <= N = 6, got clusters = 7"),
        (lambda op: op(X, 2, k=0), r"1 <= k <= 32, got k = 0"),
        (lambda op: op(X, 2, k=33), r"1 <= k <= 32, got k = 33"),
        (lambda op: op(X, 2, valid=torch.zeros(2, 5, dtype=torch.bool)), r"valid.shape = \[B, N\] = \[2, 6\]"),
        (lambda op: op(X, 2, counts=torch.zeros(2)), r"counts of dtype int32, got float32"),
        (lambda op: op(X, 2, counts=torch.zeros(3, dtype=torch.int32)), r"counts.shape = \[B\] = \[2\], got \[3\]"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::cluster_dpc_knn.*" + message):
        call(backend.ops.cluster_dpc_knn)
