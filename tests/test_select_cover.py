from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference import select_cover as reference
from vtkernels.testing.compare import assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# One below, at and above the lane, tile and warp sizes of the kernels, and primes.
SIZES = [(0, 5), (1, 1), (1, 31), (7, 2), (8, 33), (9, 32), (17, 65), (64, 64), (65, 129), (257, 40)]
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pick(backend, gains, keep, **options):
    on_device = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    return backend.ops.select_cover(backend.put(gains), keep, **on_device).cpu()


def check_exact(backend, gains, keep, **options):
    """For gains whose sums are exact in float32: small integers."""
    got = pick(backend, gains, keep, **options)
    assert got.tolist() == reference.select_cover(gains, keep, **options).tolist()


def check_greedy(backend, gains, keep, drop_mask=None):
    """Every pick is as good as the best there was, given the picks before it; both orders agree."""
    picked = pick(backend, gains, keep, drop_mask=drop_mask, order="pick")
    assert picked.dtype == torch.int64 and picked.shape == (gains.shape[0], keep)
    for b, row in enumerate(picked.tolist()):
        dropped = torch.zeros(gains.shape[2], dtype=torch.bool) if drop_mask is None else drop_mask[b]
        # A float32 sum of R nonnegative terms in blocks: a few units of 2^-24.
        assert reference.worst_shortfall(gains[b], row, dropped) <= 3e-6
    assert_same_bits(pick(backend, gains, keep, drop_mask=drop_mask), picked.sort(-1).values)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_exact_ties(backend, random, size, dtype):
    gains = torch.randint(0, 4, (2, *size), generator=random).to(dtype)
    count = size[1]
    keeps = {min(count, 12)} if backend.name == "simt" else {0, 1, count // 2, count - 1, count}
    for keep in sorted(keeps):
        for order in ("position", "pick"):
            check_exact(backend, gains, keep, order=order)


@QUICK
@given(data=st.data())
def test_any_shape(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, rows, count = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 50), (1, 70)))
    keep = data.draw(st.integers(0, count))
    drop_mask = None
    if data.draw(st.booleans()):
        drop_mask = torch.rand(batch, count, generator=random) < 0.4
        for b in range(batch):
            drop_mask[b][drop_mask[b].nonzero()[count - keep :, 0]] = False
    dtype = data.draw(st.sampled_from(FLOATS))
    if data.draw(st.booleans()):
        top = data.draw(st.integers(1, 8))
        gains = torch.randint(-1, top, (batch, rows, count), generator=random).to(dtype)
        check_exact(backend, gains, keep, drop_mask=drop_mask, order=data.draw(st.sampled_from(["position", "pick"])))
    else:
        check_greedy(backend, torch.rand(batch, rows, count, generator=random).to(dtype), keep, drop_mask)


@pytest.mark.parametrize("values", ["random", "softmax", "sorted", "sparse"])
def test_data(backend, random, values):
    rows, count = (90, 80) if backend.name == "simt" else (233, 200)
    ramp = torch.arange(float(count)).expand(1, rows, count)
    gains = {
        "random": torch.rand(1, rows, count, generator=random),
        "softmax": (4 * torch.randn(1, rows, count, generator=random)).softmax(-1) / rows,
        "sorted": ramp / count,
        "sparse": torch.rand(1, rows, count, generator=random) * (torch.rand(1, rows, count, generator=random) < 0.02),
    }[values]
    check_greedy(backend, gains, count // 2)


def test_rows_beyond_shared_memory(backend, random):
    check_exact(backend, torch.randint(0, 3, (2, 33001, 35), generator=random).bfloat16(), 3, order="pick")


def test_nothing_left_to_gain(backend):
    gains = torch.zeros(1, 40, 50)
    gains[0, 3, 44] = gains[0, 4, 20] = 1.0
    assert pick(backend, gains, 6, order="pick").tolist() == [[20, 44, 0, 1, 2, 3]]
    assert pick(backend, gains[:, :0], 4, order="pick").tolist() == [[0, 1, 2, 3]]


def test_special_values(backend):
    row = [math.nan, math.inf, 2.0, -math.inf, -3.0, 0.0, -0.0, 1e-45, 3e38, 3e38]
    gains = torch.tensor([[row, row[::-1], [1.0] * 10]])
    for keep in range(11):
        picked = pick(backend, gains, keep, order="pick")[0].tolist()
        assert picked == reference.select_cover(gains, keep, order="pick")[0].tolist()
    assert pick(backend, torch.full((1, 5, 6), math.nan), 3, order="pick").tolist() == [[0, 1, 2]]
    assert pick(backend, torch.full((1, 5, 6), -1.0), 3, order="pick").tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views(backend, random, dtype):
    gains = torch.rand(40, 3, 60, generator=random).to(dtype).transpose(0, 1)[:, 1:39:2, 3:58]
    drop_mask = (torch.rand(55, 3, generator=random) < 0.3).t()
    check_greedy(backend, gains, 20, drop_mask)
    expanded = gains[:1].expand(3, -1, -1)
    assert_same_bits(pick(backend, expanded, 20), pick(backend, expanded.contiguous(), 20))


def test_batch_rows_do_not_mix(backend, random):
    gains = torch.rand(5, 30, 70, generator=random)
    together = pick(backend, gains, 25, order="pick")
    for b in range(5):
        assert_same_bits(pick(backend, gains[b : b + 1], 25, order="pick"), together[b : b + 1])


def test_long_row(backend, random):
    count = 3000 if backend.name == "simt" else 70001
    gains = torch.randint(0, 9, (1, 6, 500), generator=random).float().repeat(1, 1, count // 500 + 1)[..., :count]
    small = pick(backend, gains[..., :500], 6, order="pick")
    assert_same_bits(pick(backend, gains, 6, order="pick"), small)  # copies gain nothing more: lower index


def test_same_bits_for_any_thread_count(random):
    gains = torch.rand(1, 700, 400, generator=random).bfloat16()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.vtk.select_cover(gains, 150, order="pick"))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


X = torch.zeros(2, 3, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(X, 7), r"keep <= N = 6, got keep = 7"),
        (lambda op: op(X, -1), r"got keep = -1"),
        (lambda op: op(X[0], 2), r"gains of shape \[B, R, N\], got \[3, 6\]"),
        (lambda op: op(X.double(), 2), r"gains of dtype float32, float16 or bfloat16, got float64"),
        (lambda op: op(X.transpose(1, 2), 2), r"gains with a contiguous last dimension"),
        (lambda op: op(X, 2, order="score"), r'order to be "position" or "pick", got "score"'),
        (lambda op: op(X, 2, drop_mask=torch.zeros(2, 5, dtype=torch.bool)), r"drop_mask.shape = \[B, N\] = \[2, 6\]"),
        (lambda op: op(X, 2, drop_mask=torch.zeros(2, 6)), r"drop_mask of dtype bool"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::select_cover.*" + message):
        call(backend.ops.select_cover)


def test_too_few_allowed(backend):
    drop_mask = torch.zeros(2, 6, dtype=torch.bool)
    drop_mask[1, [0, 2, 3]] = True
    gains = torch.eye(6).expand(2, -1, -1)
    if backend.checks_values:
        with pytest.raises(RuntimeError, match="vtk::select_cover: drop_mask leaves 3 tokens of batch row 1 but keep"):
            pick(backend, gains, 4, drop_mask=drop_mask)
    else:
        assert pick(backend, gains, 4, drop_mask=drop_mask)[1].tolist() == [0, 1, 4, 5]
