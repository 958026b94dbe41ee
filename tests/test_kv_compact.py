from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference import kv_compact as reference
from vtkernels.testing.compare import assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(backend, k, v, indices):
    got = backend.ops.kv_compact(*backend.put(k, v, indices))
    for ours, expected in zip(got, reference.kv_compact(k, v, indices), strict=True):
        assert ours.is_contiguous()
        assert_same_bits(ours.cpu(), expected)


@QUICK
@given(data=st.data())
def test_any_shape(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, heads, tokens, width, kept = (data.draw(st.integers(0, most)) for most in (2, 3, 40, 20, 35))
    k, v = torch.randn(2, batch, heads, tokens, width, generator=random).to(data.draw(st.sampled_from(FLOATS)))
    shape = (batch, heads, kept if tokens else 0) if data.draw(st.booleans()) else (batch, kept if tokens else 0)
    check(backend, k, v, torch.randint(0, max(tokens, 1), shape, generator=random))


@pytest.mark.parametrize("kept", [15, 16, 17])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [64, 66, 33])  # vectors of 16, 4 and 2 bytes
def test_strided_views(backend, random, dtype, width, kept):
    k = torch.randn(2, 30, 3, width + 8, generator=random).to(dtype)[..., :width].transpose(1, 2)
    v = torch.randn(1, 3, 60, width, generator=random).to(dtype)[:, :, ::2].expand(2, -1, -1, -1)
    indices = torch.randint(0, 30, (kept, 3, 2), generator=random).permute(2, 1, 0)
    check(backend, k, v, indices)
    check(backend, k, v, indices[:, 1])


def test_special_values(backend):
    k = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]).view(1, 1, 2, 2)
    check(backend, k, -k, torch.tensor([[1, 0, 1]]))


def test_large_output(random):
    """Beyond the size at which the CPU writes past the caches."""
    k, v = torch.randn(2, 1, 4, 9000, 128, generator=random)
    indices = torch.randint(0, 9000, (1, 4, 8000), generator=random)
    where = indices[..., None].expand(-1, -1, -1, 128)
    assert all(map(torch.equal, torch.ops.vtk.kv_compact(k, v, indices), (k.gather(2, where), v.gather(2, where))))


K, INDICES = torch.zeros(2, 3, 6, 8), torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(K[0], K[0], INDICES), r"k of shape \[B, Hk, N, D\], got \[3, 6, 8\]"),
        (lambda op: op(K.double(), K.double(), INDICES), r"k of dtype float32, float16 or bfloat16, got float64"),
        (lambda op: op(K, K.half(), INDICES), r"v of dtype float32, got float16"),
        (lambda op: op(K, K[:, :2], INDICES), r"v.shape = \[B, Hk, N, D\] = \[2, 3, 6, 8\], got \[2, 2, 6, 8\]"),
        (lambda op: op(K.mT, K.mT, INDICES), r"k with a contiguous last dimension"),
        (lambda op: op(K.mT.contiguous(), K.mT, INDICES), r"v with a contiguous last dimension"),
        (lambda op: op(K, K, INDICES.int()), r"indices of dtype int64, got int32"),
        (lambda op: op(K, K, INDICES[:1]), r"\[2, K\] or \[2, 3, K\], got \[1, 4\]"),
        (lambda op: op(K, K, INDICES[:, None]), r"\[2, K\] or \[2, 3, K\], got \[2, 1, 4\]"),
        (lambda op: op(K[:, :, :0], K[:, :, :0], INDICES), r"indices without entries for k with N = 0 tokens"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::kv_compact.*" + message):
        call(backend.ops.kv_compact)


@pytest.mark.parametrize(("bad", "nearest"), [(6, 5), (-1, 0), (2**40, 5), (-(2**63), 0)])
def test_indices_that_are_no_token(backend, bad, nearest):
    k = torch.arange(6.0).view(1, 1, 6, 1)
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=rf"vtk::kv_compact: .*indices < N = 6, got {bad} at \[0, 1\]"):
            backend.ops.kv_compact(k, k, torch.tensor([[0, bad]]))
        with pytest.raises(RuntimeError, match=rf"got {bad} at \[0, 0, 1\]"):
            backend.ops.kv_compact(k, k, torch.tensor([[[0, bad]]]))
    else:
        out, _ = backend.ops.kv_compact(*backend.put(k, k, torch.tensor([[0, bad]])))
        assert out.flatten().tolist() == [0, nearest]
