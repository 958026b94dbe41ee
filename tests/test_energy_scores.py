from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.score import eager_energy
from tests.merge_data import drop_some, exact_metric, golden_metric
from tests.reference import energy_scores as reference
from vtkernels.testing.compare import assert_close, assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def energies(backend, metric, **options):
    moved = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    scores = backend.ops.energy_scores(backend.put(metric), **moved)
    assert scores.dtype == torch.float32
    return scores.cpu()


def check(backend, metric, **options):
    expected = reference.energy_scores(metric, **options)
    plain = {n: v for n, v in options.items() if n != "valid"}
    native = expected if "valid" in options else eager_energy(metric, **plain).double()
    assert_close(energies(backend, metric, **options), expected, native, 2e-6)


def test_golden(backend):
    scores = energies(backend, golden_metric())
    assert scores[0].tolist() == pytest.approx([-0.3349, -0.2919, -0.2927, -0.2642, -0.2095, -0.6459], abs=1e-4)
    assert scores[0].argsort(descending=True).tolist() == [4, 3, 1, 2, 0, 5]


@QUICK
@given(
    batch=st.integers(0, 2),
    count=st.sampled_from([0, 1, 2, 47, 49, 63, 65]),
    width=st.sampled_from([1, 3, 8, 16, 33]),
    margin=st.sampled_from([-0.5, 0.0, 0.9, 1.5]),
    seed=st.integers(0, 2**16),
)
def test_shapes(backend, batch, count, width, margin, seed):
    random = torch.Generator().manual_seed(seed)
    check(backend, torch.randn(batch, count, width, generator=random), margin=margin, alpha=0.5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["elu", "gaussian"])
def test_dtypes_over_several_tiles(backend, dtype, kind, random):
    metric = torch.randn(1, 130, 24, generator=random).to(dtype)
    check(backend, metric, kind=kind, margin=0.3)


@pytest.mark.parametrize("width", [255, 256, 257, 300])
def test_depth_in_chunks(backend, width, random):
    check(backend, torch.randn(1, 12, width, generator=random), margin=0.1)


def test_valid_tokens_are_a_row_of_their_own(backend, random):
    metric = torch.randn(2, 70, 20, generator=random)
    valid = ~drop_some(random, 2, 70)
    valid[1] = False
    check(backend, metric, valid=valid)
    scores = energies(backend, metric, valid=valid)
    alone = energies(backend, metric[:1, valid[0]])
    torch.testing.assert_close(scores[0, valid[0]], alone[0], rtol=0, atol=1e-6)
    assert scores[1].tolist() == [-math.inf] * 70


def test_zero_and_tiny_vectors_have_cosine_zero(backend):
    metric = torch.zeros(1, 3, 4)
    metric[0, 1] = 1e-20
    metric[0, 2, 0] = 1e-18
    below = math.exp(-0.9) - 1
    expected = [below, below, (2 * below + 0.1) / 3]
    assert energies(backend, metric)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_tokens_without_a_cosine_count_for_nobody(backend, random):
    metric = torch.randn(1, 70, 6, generator=random)
    clean = energies(backend, torch.cat([metric[:, :3], metric[:, 4:66], metric[:, 67:]], 1))[0]
    metric[0, 3, 1], metric[0, 66, 0] = math.nan, math.inf
    scores = energies(backend, metric)[0]
    assert scores[[3, 66]].isnan().all()
    others = torch.cat([scores[:3], scores[4:66], scores[67:]])
    torch.testing.assert_close(others, clean, rtol=0, atol=1e-6)
    assert energies(backend, torch.full((1, 2, 3), math.nan)).isnan().all()


def test_equal_tokens_have_equal_energies(backend, random):
    scores = energies(backend, exact_metric(random, 1, 6, 16).repeat(1, 20, 1))[0].reshape(20, 6)
    torch.testing.assert_close(scores, scores[:1].expand(20, 6), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_views(backend, dtype, random):
    wide = torch.randn(65, 2, 40, generator=random).to(dtype)
    for metric in (wide.transpose(0, 1)[:, :, :24], wide.transpose(0, 1)[:, ::2, 1:22], wide[:, :1].expand(-1, 3, -1)):
        assert_same_bits(energies(backend, metric), energies(backend, metric.contiguous()))


def test_batch_rows_do_not_mix(backend, random):
    metric = torch.randn(3, 40, 17, generator=random)
    together = energies(backend, metric)
    for b in range(3):
        alone = energies(backend, metric[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], rtol=0, atol=1e-6)  # CUDA cuts few items into more parts


def test_same_bits_for_any_thread_count(random):
    metric = torch.randn(3, 700, 72, generator=random).bfloat16()
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(torch.ops.vtk.energy_scores(metric))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_no_gradient(random):
    metric = torch.randn(1, 8, 4, generator=random).requires_grad_()
    assert not torch.ops.vtk.energy_scores(metric).requires_grad


X = torch.zeros(2, 6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(X[0]), r"metric of shape \[B, N, C\], got \[6, 3\]"),
        (lambda op: op(X[:, :, :0]), r"metric with at least one channel"),
        (lambda op: op(X.double()), r"metric of dtype float32, float16 or bfloat16, got float64"),
        (lambda op: op(X.transpose(1, 2)), r"metric with a contiguous last dimension"),
        (lambda op: op(X, kind="relu"), r'kind to be "elu" or "gaussian", got "relu"'),
        (lambda op: op(X, margin=math.nan), r"margin to be a finite number, got nan"),
        (lambda op: op(X, alpha=math.inf), r"alpha to be a finite number, got inf"),
        (lambda op: op(X, margin=1.0, kind="gaussian"), r"margin < 1"),
        (lambda op: op(X, valid=torch.zeros(2, 5, dtype=torch.bool)), r"valid.shape = \[B, N\] = \[2, 6\]"),
        (lambda op: op(X, valid=torch.zeros(2, 6)), r"valid of dtype bool"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::energy_scores.*" + message):
        call(backend.ops.energy_scores)
