from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_merge_apply import FLOATS, REDUCES, pick_centers
from vtkernels.testing.compare import assert_same_bits

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(backend, values, owner, out_len, reduce="weighted_mean", weight=None):
    """Each tensor as merge_apply merges it, bit by bit; [B, N] as [B, N, 1]."""
    center = pick_centers(owner, out_len, reduce)
    options = {"weight": weight, "center": center}
    options = {name: None if v is None else backend.put(v) for name, v in options.items()} | {"reduce": reduce}
    values, owner = [backend.put(v) for v in values], backend.put(owner)
    merged, total = backend.ops.merge_apply.tensors(values, owner, out_len, **options)
    assert len(merged) == len(values)
    for got, value in zip(merged, values, strict=True):
        rows = value if value.dim() == 3 else value[..., None]
        expected, expected_total = backend.ops.merge_apply(rows, owner, out_len, **options)
        assert_same_bits(got, expected if value.dim() == 3 else expected.squeeze(-1))
        assert_same_bits(total, expected_total)


@pytest.mark.parametrize("reduce", REDUCES)
@QUICK
@given(data=st.data())
def test_any_shape(backend, reduce, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, count, out_len = (data.draw(st.integers(0, high)) for high in (3, 40, 20))
    shapes = data.draw(st.lists(st.sampled_from([(), (0,), (1,), (7,), (16,), (33,)]), min_size=1, max_size=5))
    values = [
        torch.randn(batch, count, *shape, generator=random).to(data.draw(st.sampled_from(FLOATS))) for shape in shapes
    ]
    owner = torch.randint(-1, max(out_len, 1), (batch, count), generator=random).clamp_max(out_len - 1)
    weight = torch.rand(batch, count, generator=random) + 0.5 if data.draw(st.booleans()) else None
    check(backend, values, owner, out_len, reduce, weight)


def test_strided_views(backend, random):
    hidden = torch.randn(30, 2, 40, generator=random).transpose(0, 1)[:, :, 3:36]
    mask = torch.rand(30, 6, generator=random).bfloat16().t()[::3]
    owner = torch.randint(-1, 9, (30, 2), generator=random).t()
    check(backend, [hidden, mask, mask[:1].expand(2, -1)], owner, 9)


def test_sixteen_tensors(backend, random):
    values = [torch.randn(1, 20, width, generator=random) for width in range(16)]
    check(backend, values, torch.randint(0, 5, (1, 20), generator=random), 5)


@pytest.mark.parametrize("reduce", ["weighted_mean", "max", "pivot"])
def test_gradient(random, reduce):
    """That of merge_apply for each tensor, and none for what asks for none."""
    owner = torch.randint(0, 6, (2, 17), generator=random)
    values = [torch.randn(2, 17, *shape, generator=random) for shape in ((5,), (), (3,))]
    center = pick_centers(owner, 6, reduce)
    ours, plain = ([v.clone().requires_grad_(i < 2) for i, v in enumerate(values)] for _ in range(2))
    merged, total = torch.ops.vtk.merge_apply.tensors(ours, owner, 6, reduce=reduce, center=center)
    assert not total.requires_grad
    for i, (got, value) in enumerate(zip(merged, plain, strict=True)):
        upstream = torch.randn(got.shape, generator=random)
        if i < 2:
            rows = value if value.dim() == 3 else value[..., None]
            expected, _ = torch.ops.vtk.merge_apply(rows, owner, 6, reduce=reduce, center=center)
            (expected.reshape(got.shape) * upstream).sum().backward()
            (got * upstream).sum().backward(retain_graph=True)
            assert_same_bits(ours[i].grad, value.grad)
    assert ours[2].grad is None


X, OWNER = torch.zeros(2, 6, 3), torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op([], OWNER, 2), r"1 to 16 tensors in values, got 0"),
        (lambda op: op([X] * 17, OWNER, 2), r"1 to 16 tensors in values, got 17"),
        (lambda op: op([X, X[:, 1:]], OWNER, 2), r"values\[1\] of shape \[B, N, D\] or \[B, N\].* got \[2, 5, 3\]"),
        (lambda op: op([X, X[0, 0]], OWNER, 2), r"values\[1\] of shape \[B, N, D\] or \[B, N\].* got \[3\]"),
        (lambda op: op([X, X.double()], OWNER, 2), r"values\[1\] of dtype float32, float16 or bfloat16, got float64"),
        (
            lambda op: op([X, X.transpose(1, 2).contiguous().transpose(1, 2)], OWNER, 2),
            r"values\[1\] with a contiguous",
        ),
        (lambda op: op([X], OWNER[0], 2), r"owner of shape \[B, N\], got \[6\]"),
        (lambda op: op([X], OWNER, -1), r"out_len >= 0, got -1"),
        (lambda op: op([X], OWNER, 2, reduce="median"), r"expected reduce to be .* got \"median\""),
        (lambda op: op([X], OWNER, 2, weight=X), r"weight.shape = \[B, N\] = \[2, 6\], got \[2, 6, 3\]"),
        (lambda op: op([X], OWNER, 2, reduce="pivot"), r"expected center with reduce"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::merge_apply.*" + message):
        call(backend.ops.merge_apply.tensors)
