from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference import temporal_segments as reference
from vtkernels.testing.compare import assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOLDEN = [[0.9, 0.9, 0.2, 0.9], [0.9, 0.9, 0.9, 0.1], [0.1, 0.2, 0.3, 0.1], [0.95, 0.95, 0.95, 0.95]]


def cut(backend, similarity, **options):
    segment, is_static, gain = backend.ops.temporal_segments(backend.put(similarity), **options)
    assert segment.dtype == gain.dtype == torch.int64 and is_static.dtype == torch.bool
    return segment.cpu(), is_static.cpu(), gain.cpu()


def check(backend, similarity, **options):
    expected = reference.temporal_segments(similarity, **options)
    for ours, theirs in zip(cut(backend, similarity, **options), expected, strict=True):
        assert_same_bits(ours, theirs)


def runs(random, shape, share=0.75):
    """Similarities that change rarely along the frames: segments of several frames."""
    similar = torch.rand(shape, generator=random) < share
    return similar * 0.5 + torch.rand(shape, generator=random) * 0.4


def test_golden(backend):
    segment, is_static, gain = cut(backend, torch.tensor([GOLDEN]), threshold=0.8)
    assert segment.tolist() == [[0, 0, 0, 1, 1]] and gain.tolist() == [8]
    assert is_static[0, 0].tolist() == [True, True, False, False] and is_static[0, 3:].all()


@pytest.mark.parametrize(("window", "gain"), [(1, 0), (2, 7), (3, 8), (1024, 8)])
def test_golden_windows(backend, window, gain):
    assert cut(backend, torch.tensor([GOLDEN]), threshold=0.8, max_window=window)[2].tolist() == [gain]
    check(backend, torch.tensor([GOLDEN]), threshold=0.8, max_window=window)


@QUICK
@given(
    batch=st.integers(0, 3),
    frames=st.sampled_from([1, 2, 3, 7, 16]),
    positions=st.sampled_from([0, 1, 2, 5, 33]),
    window=st.sampled_from([1, 2, 3, 5, 1024]),
    share=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_shapes_and_ties(backend, batch, frames, positions, window, share, seed):
    random = torch.Generator().manual_seed(seed)
    check(backend, runs(random, (batch, frames - 1, positions), share), threshold=0.45, max_window=window)


def test_ties_prefer_the_shorter_last_segment(backend):
    one = torch.tensor([[[1.0], [1.0], [0.0], [1.0], [1.0]]])
    check(backend, one, threshold=0.5)
    # Two pairs with two positions each, of which none is static over both: cutting either way gains 2.
    either = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])
    segment, _, gain = cut(backend, either, threshold=0.5)
    assert segment.tolist() == [[0, 0, 1]] and gain.tolist() == [2]
    # Three frames in one: 1 * 2; or a pair and a single frame: 2 * 1. The single frame is shorter.
    longer = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    segment, _, gain = cut(backend, longer, threshold=0.5)
    assert segment.tolist() == [[0, 0, 1]] and gain.tolist() == [2]


def test_nothing_stands_still(backend):
    segment, is_static, gain = cut(backend, torch.zeros(2, 4, 3), threshold=0.0)
    assert segment.tolist() == [[0, 1, 2, 3, 4]] * 2 and not is_static.any() and gain.tolist() == [0, 0]


def test_everything_stands_still(backend):
    segment, is_static, gain = cut(backend, torch.ones(1, 40, 70), threshold=0.9)
    assert not segment.any() and is_static.all() and gain.tolist() == [2800]


def test_nan_and_infinity(backend):
    similarity = torch.tensor([[[math.nan, math.inf, -math.inf, 1.0]] * 3])
    _, is_static, gain = cut(backend, similarity, threshold=0.5)
    assert gain.tolist() == [6] and is_static[0].tolist() == [[False, True, False, True]] * 4


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(backend, dtype, random):
    check(backend, runs(random, (2, 11, 20)).to(dtype), threshold=0.45)


@pytest.mark.parametrize("window", [3, 1024])
def test_many_frames(window):
    """Alike in blocks of 100 frames: the cut follows the blocks, or the window."""
    similarity = torch.ones(1, 1023, 5)
    similarity[0, 99::100] = 0
    segment, is_static, gain = torch.ops.vtk.temporal_segments(similarity, threshold=0.5, max_window=window)
    if window == 1024:
        assert segment[0].tolist() == [frame // 100 for frame in range(1024)]
        assert gain.tolist() == [5 * (1023 - 10)] and is_static.all()
    else:
        assert segment[0].bincount().max() == 3 and gain.tolist() == [5 * (10 * 66 + 16)]


def test_strided_views(backend, random):
    wide = runs(random, (12, 2, 40)).transpose(0, 1)
    for view in (wide[:, :, 3:30], wide[:, ::2], wide[:1].expand(3, -1, -1)):
        for ours, theirs in zip(
            cut(backend, view, threshold=0.45), cut(backend, view.contiguous(), threshold=0.45), strict=True
        ):
            assert_same_bits(ours, theirs)


def test_cu_seqlens_of_the_docstring(backend, random):
    segment, _, _ = cut(backend, runs(random, (3, 15, 6)), threshold=0.45)
    marks = torch.searchsorted(segment, torch.arange(17).expand(3, -1).contiguous())
    for b in range(3):
        for n in range(16):
            assert (segment[b] == n).nonzero()[:, 0].tolist() == list(range(int(marks[b, n]), int(marks[b, n + 1])))


X = torch.zeros(2, 6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(X[0], threshold=0.5), r"similarity of shape \[B, F - 1, S\], got \[6, 3\]"),
        (lambda op: op(X.double(), threshold=0.5), r"similarity of dtype float32, float16 or bfloat16, got float64"),
        (lambda op: op(X.transpose(1, 2), threshold=0.5), r"similarity with a contiguous last dimension"),
        (lambda op: op(X, threshold=math.nan), r"threshold to be a number"),
        (lambda op: op(X, threshold=0.5, max_window=0), r"max_window >= 1, got 0"),
        (lambda op: op(X[:1, :1].expand(1, 2**30, 3), threshold=0.5), r"token count F \* S = \d+ exceeds"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::temporal_segments.*" + message):
        call(backend.ops.temporal_segments)
