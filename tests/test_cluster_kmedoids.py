from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.merge_data import drop_some
from tests.reference import cluster_kmedoids as reference
from vtkernels.testing.compare import assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def cluster(backend, tokens, clusters, **options):
    moved = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    medoids, owner = backend.ops.cluster_kmedoids(backend.put(tokens), clusters, **moved)
    assert medoids.dtype == owner.dtype == torch.int64
    return medoids.cpu(), owner.cpu()


def check(backend, tokens, clusters, **options):
    medoids, owner = cluster(backend, tokens, clusters, **options)
    expected_medoids, expected_owner = reference.cluster_kmedoids(tokens, clusters, **options)
    assert medoids.tolist() == expected_medoids.tolist()
    assert owner.tolist() == expected_owner.tolist()


def on_a_line(random, batch, count, width, most=12):
    """Whole numbers in one channel: distances and their sums are exact, and ties are everywhere."""
    tokens = torch.zeros(batch, count, width)
    tokens[:, :, width // 2] = torch.randint(-most, most + 1, (batch, count), generator=random).float()
    return tokens


def test_by_hand(backend):
    tokens = torch.tensor([[[0.0], [1.0], [2.0], [10.0], [11.0]]])
    # Seeds: 11, then 0. Members 0 1 2 have their sum smallest at 1; of 10 and 11 the lower token wins.
    assert [t.tolist() for t in cluster(backend, tokens, 2)] == [[[1, 3]], [[0, 0, 0, 1, 1]]]
    assert [t.tolist() for t in cluster(backend, tokens, 2, iterations=0)] == [[[0, 4]], [[0, 0, 0, 1, 1]]]
    # They move by 1 + 1: not below 2, so the second iteration, in which nobody moves, is the last.
    assert cluster(backend, tokens, 2, tolerance=2.0)[0].tolist() == [[1, 3]]


@QUICK
@given(
    batch=st.integers(0, 3),
    count=st.sampled_from([1, 2, 5, 15, 16, 17, 33]),
    width=st.sampled_from([1, 3, 33]),
    share=st.floats(0, 1),
    iterations=st.sampled_from([0, 1, 2, 100]),
    seed=st.integers(0, 2**16),
)
def test_shapes_and_ties(backend, batch, count, width, share, iterations, seed):
    random = torch.Generator().manual_seed(seed)
    clusters = min(int(share * count), 9)
    check(backend, on_a_line(random, batch, count, width), clusters, iterations=iterations)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(backend, dtype, random):
    check(backend, torch.randn(2, 40, 24, generator=random).to(dtype), 7)


@pytest.mark.parametrize("width", [255, 256, 257])
def test_depth_in_chunks(backend, width, random):
    check(backend, torch.randn(1, 12, width, generator=random), 3)


@pytest.mark.parametrize("tolerance", [0.5, 3.0, math.inf])
def test_tolerance_ends_the_iteration(backend, tolerance, random):
    check(backend, torch.randn(2, 30, 3, generator=random), 4, tolerance=tolerance)


@pytest.mark.parametrize("count", [1024, 1025])
def test_with_and_without_the_matrix(count):
    """Around the CPU's limit: whole numbers on a line, of which every third is far away."""
    tokens = torch.arange(float(count))[None, :, None].clone()
    tokens[0, ::3] += 10000
    medoids, owner = torch.ops.vtk.cluster_kmedoids(tokens, 2)
    far = torch.arange(count) % 3 == 0
    groups = [(~far).nonzero()[:, 0], far.nonzero()[:, 0]]
    middles = [int(group[(len(group) - 1) // 2]) for group in groups]  # the lower median has the smallest sum
    assert medoids[0].tolist() == sorted(middles)
    assert all(
        (owner[0, group] == medoids[0].tolist().index(m)).all() for group, m in zip(groups, middles, strict=True)
    )


def test_valid(backend, random):
    tokens, valid = torch.randn(3, 35, 5, generator=random), ~drop_some(random, 3, 35)
    valid[1], valid[2, 3:] = False, False
    check(backend, tokens, 5, valid=valid)
    medoids, owner = cluster(backend, tokens, 5, valid=valid)
    assert medoids[1].tolist() == [-1] * 5 and (owner[1] == -1).all() and medoids[2, 3:].tolist() == [-1, -1]


def test_equal_tokens_give_distinct_medoids(backend):
    medoids, owner = cluster(backend, torch.ones(1, 20, 3), 4)
    assert medoids.tolist() == [[0, 1, 2, 3]] and owner[0].tolist() == [0, 1, 2, 3] + [0] * 16


def test_nan_infinity_and_huge_norms_take_no_part(backend, random):
    tokens = torch.randn(1, 20, 4, generator=random)
    tokens[0, 3, 1], tokens[0, 7, 0], tokens[0, 11] = math.nan, math.inf, 1e19
    check(backend, tokens, 5)
    medoids, owner = cluster(backend, torch.full((1, 3, 2), math.nan), 2)
    assert medoids.tolist() == [[-1, -1]] and owner.tolist() == [[-1] * 3]


def test_all_tokens_are_medoids(backend, random):
    medoids, owner = cluster(backend, torch.randn(2, 9, 4, generator=random), 9)
    assert medoids.tolist() == owner.tolist() == [list(range(9))] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_views(backend, dtype, random):
    wide = torch.randn(18, 2, 40, generator=random).to(dtype)
    for tokens in (wide.transpose(0, 1)[:, :, :24], wide.transpose(0, 1)[:, ::2, 1:22], wide[:9, :1].expand(-1, 3, -1)):
        ours, plain = cluster(backend, tokens, 3), cluster(backend, tokens.contiguous(), 3)
        assert_same_bits(ours[0], plain[0])
        assert_same_bits(ours[1], plain[1])


def test_batch_rows_do_not_mix(backend, random):
    """One row converges at once, the others later: each has its own end."""
    tokens = torch.randn(4, 24, 3, generator=random)
    tokens[0] = 0
    medoids, owner = cluster(backend, tokens, 4)
    for b in range(4):
        alone = cluster(backend, tokens[b : b + 1], 4)
        assert_same_bits(alone[0], medoids[b : b + 1])
        assert_same_bits(alone[1], owner[b : b + 1])


@pytest.mark.parametrize("count", [400, 1300])
def test_same_bits_for_any_thread_count(count, random):
    tokens = torch.randn(1, count, 40, generator=random).bfloat16()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.vtk.cluster_kmedoids(tokens, 20, iterations=4))
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
        (lambda op: op(X, 7), r"0 <= clusters <= N = 6, got clusters = 7"),
        (lambda op: op(X, 2, iterations=-1), r"iterations >= 0, got -1"),
        (lambda op: op(X, 2, tolerance=-0.5), r"tolerance >= 0, got -0.5"),
        (lambda op: op(X, 2, tolerance=math.nan), r"tolerance >= 0, got nan"),
        (lambda op: op(X, 2, valid=torch.zeros(2, 5, dtype=torch.bool)), r"valid.shape = \[B, N\] = \[2, 6\]"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::cluster_kmedoids.*" + message):
        call(backend.ops.cluster_kmedoids)
