from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference import select_diverse as reference
from vtkernels.testing.compare import assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
MODES = ["max_min", "max_sum"]
# Similarities are float32 dots of unit vectors: a few units of 2^-24 each, and a sum has `keep` of them.
DOT_ERROR = 2e-6
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pick(backend, features, keep, seed=None, **options):
    on_device = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    seed = None if seed is None else backend.put(seed)
    return backend.ops.select_diverse(backend.put(features), keep, seed, **on_device).cpu()


def check_exact(backend, features, keep, seed=None, **options):
    """For features whose similarities are exact in float32."""
    got = pick(backend, features, keep, seed, **options)
    assert got.tolist() == reference.select_diverse(features, keep, seed, **options).tolist()


def check_greedy(backend, features, keep, seed=None, mode="max_min", drop_mask=None):
    """Every pick is as good as the best there was, given the picks before it; both orders agree."""
    picked = pick(backend, features, keep, seed, mode=mode, drop_mask=drop_mask, order="pick")
    assert picked.dtype == torch.int64 and picked.shape == (features.shape[0], keep)
    for b, row in enumerate(picked.tolist()):
        dropped = torch.zeros(features.shape[1], dtype=torch.bool) if drop_mask is None else drop_mask[b]
        if keep:
            first = int((~dropped).nonzero()[0]) if seed is None else int(seed[b])
            assert row[0] == first
        allowed = DOT_ERROR * (keep if mode == "max_sum" else 1)
        assert reference.worst_excess(features[b], row, dropped, mode) <= allowed
    by_position = pick(backend, features, keep, seed, mode=mode, drop_mask=drop_mask)
    assert_same_bits(by_position, picked.sort(-1).values)


def exact_features(random, batch, count, width):
    """Rows with 1, 4 or 16 entries of +-1, others 0: cosines are multiples of 1/16, and ties are everywhere."""
    most = torch.tensor([n for n in (0, 1, 4, 16) if n <= width][-3:])
    entries = most[torch.randint(len(most), (batch, count, 1), generator=random)]
    rank = torch.rand(batch, count, width, generator=random).argsort(-1)
    return (rank < entries) * (torch.randint(0, 2, (batch, count, width), generator=random) * 2.0 - 1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 31, 33, 100])
def test_exact_ties(backend, random, count, mode, dtype):
    features = exact_features(random, 2, count, 18).to(dtype)
    keeps = {2, count // 2} if backend.name == "simt" else {0, 1, 2, count // 2, count - 1, count}
    for keep in sorted(keeps & set(range(count + 1))):
        for order in ("position", "pick"):
            check_exact(backend, features, keep, mode=mode, order=order)


@pytest.mark.parametrize("mode", MODES)
@QUICK
@given(data=st.data())
def test_any_shape(backend, mode, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, count, width = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (1, 70), (0, 40)))
    drop_mask = seed = None
    keep = data.draw(st.integers(0, count))
    if data.draw(st.booleans()):
        drop_mask = torch.rand(batch, count, generator=random) < 0.4
        for b in range(batch):
            drop_mask[b][drop_mask[b].nonzero()[count - max(keep, 1) :, 0]] = False
    if data.draw(st.booleans()):
        free = torch.ones(batch, count) if drop_mask is None else (~drop_mask).float()
        seed = free.multinomial(1, generator=random)[:, 0] if batch else torch.zeros(0, dtype=torch.int64)
    if data.draw(st.booleans()):
        order = data.draw(st.sampled_from(["position", "pick"]))
        features = exact_features(random, batch, count, width)
        check_exact(backend, features, keep, seed, mode=mode, drop_mask=drop_mask, order=order)
    else:
        dtype = data.draw(st.sampled_from(FLOATS))
        features = torch.randn(batch, count, width, generator=random).to(dtype)
        check_greedy(backend, features, keep, seed, mode=mode, drop_mask=drop_mask)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [255, 256, 257, 1031])
def test_widths(backend, random, width, mode, dtype):
    check_greedy(backend, torch.randn(1, 65, width, generator=random).to(dtype), 40, mode=mode)


def clustered(random, count, width):
    """Near-duplicates around few centres and a common mean, as vision features are."""
    centres = torch.randn(7, width, generator=random)
    noise = 0.2 * torch.randn(1, count, width, generator=random)
    return centres[torch.randint(7, (1, count), generator=random)] + 0.5 + noise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", ["random", "clustered", "low_rank", "equal", "opposite"])
def test_data(backend, random, values, mode):
    count = 150 if backend.name == "simt" else 600
    rank = torch.randn(1, count, 4, generator=random) @ torch.randn(4, 64, generator=random)
    sign = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)[None, :, None]
    features = {
        "random": torch.randn(1, count, 64, generator=random),
        "clustered": clustered(random, count, 64),
        "low_rank": rank,
        "equal": torch.ones(1, count, 64),
        "opposite": sign * torch.ones(1, count, 64),
    }[values]
    keep = 100 if backend.name == "simt" else 200
    if values in ("equal", "opposite"):
        check_exact(backend, features, keep, mode=mode, order="pick")
    else:
        check_greedy(backend, features, keep, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_special_values(backend, random, mode):
    features = exact_features(random, 1, 24, 4)
    features[0, 2] = 0.0  # a zero vector
    features[0, 3] = 1e-30  # its squared norm is no float32: counts as one
    features[0, 4, 1] = math.nan
    features[0, 9, 0] = math.inf
    features[0, 11] = 1e30  # norm beyond float32
    features[0, 17] = math.nan
    features[0, 5] *= 2.0**40
    features[0, 6] *= 2.0**-40
    for keep in range(25):
        for seed in (None, torch.tensor([4]), torch.tensor([2])):
            check_exact(backend, features, keep, seed, mode=mode, order="pick")
    drop_mask = torch.zeros(1, 24, dtype=torch.bool)
    drop_mask[0, [0, 4, 7]] = True
    check_exact(backend, features, 21, mode=mode, drop_mask=drop_mask, order="pick")


@pytest.mark.parametrize("mode", MODES)
def test_all_nan(backend, mode):
    assert pick(backend, torch.full((2, 9, 5), math.nan), 4, mode=mode, order="pick").tolist() == [[0, 1, 2, 3]] * 2
    seed = torch.tensor([7, 0])
    got = pick(backend, torch.full((2, 9, 5), math.nan), 3, seed, mode=mode, order="pick")
    assert got.tolist() == [[7, 0, 1], [0, 1, 2]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views(backend, random, dtype):
    wide = torch.randn(50, 3, 40, generator=random).to(dtype)
    features = wide.transpose(0, 1)[:, 1:49:2, 3:36]
    drop_mask = (torch.rand(24, 3, generator=random) < 0.3).t()
    for mode in MODES:
        check_greedy(backend, features, 9, mode=mode, drop_mask=drop_mask)
        seed = torch.tensor([5, 0, 6, 0, 7, 0])[::2]
        got = pick(backend, features[:1].expand(3, -1, -1), 9, seed, mode=mode)
        assert_same_bits(got, pick(backend, features[:1].expand(3, -1, -1).contiguous(), 9, seed.clone(), mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_rows_beyond_shared_memory(backend, random, mode):
    check_greedy(backend, torch.randn(1, 20, 20001, generator=random), 6, mode=mode)
    check_greedy(backend, torch.randn(1, 9, 120000, generator=random).bfloat16(), 3, mode=mode)


def test_batch_rows_do_not_mix(backend, random):
    features = torch.randn(5, 60, 33, generator=random)
    for mode in MODES:
        together = pick(backend, features, 20, mode=mode, order="pick")
        for b in range(5):
            assert_same_bits(pick(backend, features[b : b + 1], 20, mode=mode, order="pick"), together[b : b + 1])


def test_long_row(backend, random):
    count = 3000 if backend.name == "simt" else 70001
    features = exact_features(random, 1, 500, 20).repeat(1, count // 500 + 1, 1)[:, :count]
    for mode in MODES:
        small = pick(backend, features[:, :500], 6, mode=mode, order="pick")
        assert_same_bits(pick(backend, features, 6, mode=mode, order="pick"), small)  # copies tie: lower index


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_thread_count(random, mode):
    features = torch.randn(1, 400, 700, generator=random).bfloat16()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.vtk.select_diverse(features, 150, mode=mode, order="pick"))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


X = torch.zeros(2, 6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(X, 7), r"keep <= N = 6, got keep = 7"),
        (lambda op: op(X, -1), r"got keep = -1"),
        (lambda op: op(X[0], 2), r"features of shape \[B, N, C\], got \[6, 3\]"),
        (lambda op: op(X.double(), 2), r"features of dtype float32, float16 or bfloat16, got float64"),
        (lambda op: op(X.transpose(1, 2), 2), r"features with a contiguous last dimension"),
        (lambda op: op(X, 2, torch.zeros(3, dtype=torch.int64)), r"seed.shape = \[B\] = \[2\], got \[3\]"),
        (lambda op: op(X, 2, torch.zeros(2, dtype=torch.int32)), r"seed of dtype int64, got int32"),
        (lambda op: op(X, 2, mode="min"), r'mode to be "max_min" or "max_sum", got "min"'),
        (lambda op: op(X, 2, order="score"), r'order to be "position" or "pick", got "score"'),
        (lambda op: op(X, 2, drop_mask=torch.zeros(2, 5, dtype=torch.bool)), r"drop_mask.shape = \[B, N\] = \[2, 6\]"),
        (lambda op: op(X, 2, drop_mask=torch.zeros(2, 6)), r"drop_mask of dtype bool"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::select_diverse.*" + message):
        call(backend.ops.select_diverse)


def test_contradictory_values(backend):
    drop_mask = torch.zeros(2, 6, dtype=torch.bool)
    drop_mask[1, [0, 2, 3]] = True
    features = torch.eye(6).expand(2, -1, -1)
    calls = [
        (dict(keep=4, drop_mask=drop_mask), "drop_mask leaves 3 tokens of batch row 1 but keep = 4", [0, 1, 4, 5]),
        (dict(keep=2, seed=torch.tensor([0, 6])), r"0 <= seed < N = 6, got seed\[1\] = 6", [0, 5]),
        (dict(keep=2, seed=torch.tensor([0, -1])), r"got seed\[1\] = -1", [0, 1]),
        (dict(keep=2, seed=torch.tensor([1, 2]), drop_mask=drop_mask), r"seed\[1\] = 2 is set in drop_mask", [1, 4]),
    ]
    for options, message, clamped in calls:
        if backend.checks_values:
            with pytest.raises(RuntimeError, match="vtk::select_diverse: .*" + message):
                pick(backend, features, **options)
        else:
            assert pick(backend, features, **options)[1].tolist() == clamped
