from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference import unmerge as reference
from vtkernels.testing.compare import assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(backend, merged, owner):
    out = backend.ops.unmerge(*backend.put(merged, owner))
    assert_same_bits(out.cpu(), reference.unmerge(merged, owner).contiguous())


def test_golden(backend):
    """The merge of two pairs of six tokens, undone."""
    merged, owner = torch.tensor([[[1.5], [3.5], [5.0], [6.0]]]), torch.tensor([[0, 0, 1, 1, 2, 3]])
    out = backend.ops.unmerge(*backend.put(merged, owner))
    assert out.flatten().tolist() == [1.5, 1.5, 3.5, 3.5, 5, 6]


@QUICK
@given(data=st.data())
def test_any_shape(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, count, width, rows = (data.draw(st.integers(0, high)) for high in (3, 40, 40, 30))
    merged = torch.randn(batch, rows, width, generator=random).to(data.draw(st.sampled_from(FLOATS)))
    owner = torch.randint(-1, max(rows, 1), (batch, count), generator=random).clamp_max(rows - 1)
    check(backend, merged, owner)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views(backend, random, dtype):
    merged = torch.randn(30, 3, 40, generator=random).to(dtype).transpose(0, 1)[:, 1:29:2, 3:36]
    owner = torch.randint(-1, 14, (50, 3), generator=random).t()[:, ::2]
    check(backend, merged, owner)
    check(backend, merged[:1].expand(3, -1, -1), owner)


def test_special_values(backend):
    merged = torch.tensor([[[float("nan"), -0.0], [float("inf"), 1e-45]]])
    check(backend, merged, torch.tensor([[1, 0, -1, 0, 1]]))


def test_large_output(random):
    """Beyond the size at which the CPU writes past the caches."""
    merged, owner = torch.randn(2, 700, 2048, generator=random), torch.randint(-1, 700, (2, 1500), generator=random)
    out = torch.ops.vtk.unmerge(merged, owner)
    expected = merged.gather(1, owner.clamp_min(0)[..., None].expand(-1, -1, 2048)) * (owner >= 0)[..., None]
    assert torch.equal(out, expected)


def test_gradient_sums_over_the_tokens_of_a_row(random):
    merged = torch.randn(2, 5, 3, generator=random)
    owner, upstream = torch.randint(-1, 5, (2, 11), generator=random), torch.randn(2, 11, 3, generator=random)
    ours, exact = merged.clone().requires_grad_(), merged.double().requires_grad_()
    (torch.ops.vtk.unmerge(ours, owner) * upstream).sum().backward()
    (reference.unmerge(exact, owner) * upstream).sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)


X, OWNER = torch.zeros(2, 6, 3), torch.zeros(2, 9, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(X[0], OWNER), r"merged of shape \[B, M, D\], got \[6, 3\]"),
        (lambda op: op(X.double(), OWNER), r"merged of dtype float32, float16 or bfloat16, got float64"),
        (lambda op: op(X.transpose(1, 2), OWNER), r"merged with a contiguous last dimension"),
        (lambda op: op(torch.zeros(0, 6, 2**26 + 1), OWNER[:0]), r"merged with at most 67108864 channels"),
        (lambda op: op(X, OWNER[0]), r"owner of shape \[B, N\], got \[9\]"),
        (lambda op: op(X, OWNER[:1]), r"owner.shape = \[B, N\] = \[2, 9\], got \[1, 9\]"),
        (lambda op: op(X, OWNER.int()), r"owner of dtype int64, got int32"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::unmerge.*" + message):
        call(backend.ops.unmerge)


@pytest.mark.parametrize("bad", [6, -2, 2**40])
def test_owners_that_are_no_row(backend, bad):
    owner = torch.tensor([[0, bad, 5]])
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=rf"vtk::unmerge: .*M = 6, got owner\[0, 1\] = {bad}"):
            backend.ops.unmerge(X[:1], owner)
    else:
        out = backend.ops.unmerge(*backend.put(X[:1] + 1, owner))
        assert out[0, :, 0].tolist() == [1, 0, 1]
