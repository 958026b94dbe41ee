from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.merge_data import assert_weights, plain_merge
from tests.reference import merge_apply as reference
from vtkernels.ops import merge as family
from vtkernels.testing.compare import assert_close, assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
PLAIN = ["weighted_mean", "mean", "sum", "max"]
CENTERED = ["target_plus_mean", "beta", "pivot", "similarity_weighted", "sequential_half", "prune"]
REDUCES = PLAIN + CENTERED
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pick_centers(owner, out_len, reduce):
    """Of every row the token in the middle; None where the reduction knows no center."""
    if reduce in PLAIN:
        return None
    rows = [[(row == m).nonzero()[:, 0].tolist() for m in range(out_len)] for row in owner]
    middle = [[tokens[len(tokens) // 2] if tokens else -1 for tokens in row] for row in rows]
    return torch.tensor(middle, dtype=torch.int64).reshape(owner.shape[0], out_len)


def apply(backend, values, owner, out_len, weight=None, reduce="weighted_mean", center=None, **options):
    options |= {"weight": weight, "center": center}
    options = {name: backend.put(v) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    merged, total = backend.ops.merge_apply(*backend.put(values, owner), out_len, reduce=reduce, **options)
    assert merged.dtype == values.dtype and total.dtype == torch.float32
    return merged.cpu(), total.cpu()


def check(backend, values, owner, out_len, weight=None, reduce="weighted_mean", beta=0.6):
    center = pick_centers(owner, out_len, reduce)
    merged, total = apply(backend, values, owner, out_len, weight, reduce, center, beta=beta)
    expected, expected_total = reference.merge_apply(values, owner, out_len, weight, reduce, center, beta)
    if center is None:
        native = plain_merge(values, owner, out_len, weight, reduce)
    else:
        native, _ = reference.merge_apply(values, owner, out_len, weight, reduce, center, beta, values.dtype)
    assert_close(merged, expected, native)
    assert_weights(total, expected_total)
    # Rows of one token are copies, rows of none zeros.
    counts = torch.zeros(values.shape[0], out_len + 1, dtype=torch.int64).scatter_add(
        1, owner + 1, torch.ones_like(owner)
    )
    for b, row in (counts[:, 1:] == 1).nonzero().tolist():
        assert_same_bits(merged[b, row], values[b, int((owner[b] == row).nonzero())].contiguous())
    assert not merged[counts[:, 1:] == 0].any()


def test_sums_by_hand(backend):
    values = torch.tensor([[[1.0], [2.0], [6.0], [-4.0]]])
    owner, weight = torch.tensor([[0, 1, 0, -1]]), torch.tensor([[1.0, 1.0, 3.0, 9.0]])
    expected = {"weighted_mean": [4.75, 2.0], "mean": [3.5, 2.0], "sum": [7.0, 2.0], "max": [6.0, 2.0]}
    for reduce, rows in expected.items():
        merged, total = apply(backend, values, owner, 3, weight, reduce)
        assert merged[0, :, 0].tolist() == [*rows, 0.0] and total.tolist() == [[4.0, 1.0, 0.0]]


def test_merges_into_centers_by_hand(backend):
    """Sources 2, 6 and 4 into 10; a center without sources stays."""
    values = torch.tensor([[[2.0], [10.0], [6.0], [-4.0], [4.0]]])
    owner, center = torch.tensor([[0, 0, 0, 1, 0]]), torch.tensor([[1, 3, -1]])
    weight = torch.tensor([[0.5, 7.0, -1.0, 3.0, 0.25]])
    expected = {
        "target_plus_mean": 14.0,
        "beta": 0.75 * 10 + 0.25 * 4,
        "pivot": (10 + 6 + 8 + 7) / 4,
        "similarity_weighted": (10 + 1 - 6 + 1) / 4,
        "sequential_half": ((10 + 2) / 2 + 6) / 4 + 4 / 2,
        "prune": 10.0,
    }
    for reduce, row in expected.items():
        w = weight if reduce == "similarity_weighted" else None
        merged, total = apply(backend, values, owner, 3, w, reduce, center, beta=0.75)
        assert merged[0, :, 0].tolist() == [row, -4.0, 0.0]
        sizes = {"prune": [1.0, 1.0, 0.0], "similarity_weighted": [6.75, 3.0, 0.0]}.get(reduce, [4.0, 1.0, 0.0])
        assert total[0].tolist() == sizes


def test_golden_merge_of_evicted_keys(backend):
    """LOOK-M: (0.6, 0.8) and (0.8, 0.6) into (1, 0); matched and merged."""
    keys, center = torch.tensor([[[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]]]), torch.tensor([[2]])
    owner, similarity = (t.cpu() for t in backend.ops.nearest_match(*backend.put(keys, center)))
    expected = {"mean": [0.8, 0.4667], "pivot": [0.9, 0.2333], "similarity_weighted": [0.6667, 0.32]}
    for reduce, row in expected.items():
        given = None if reduce == "mean" else center
        merged, _ = apply(backend, keys, owner, 1, similarity, reduce, given)
        assert merged[0, 0].tolist() == pytest.approx(row, abs=1e-4)


def test_similarities_of_dropped_tokens_do_not_matter(backend):
    """nearest_match gives tokens that take no part -inf."""
    values, owner, center = torch.ones(1, 3, 4), torch.tensor([[0, 0, -1]]), torch.tensor([[0]])
    weight = torch.tensor([[1.0, 0.5, -math.inf]])
    merged, total = apply(backend, values, owner, 1, weight, "similarity_weighted", center)
    assert (merged == 0.75).all() and total.item() == 1.5


@pytest.mark.parametrize("reduce", REDUCES)
@QUICK
@given(data=st.data())
def test_any_shape(backend, reduce, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, count, width, rows = (data.draw(st.integers(0, high)) for high in (3, 60, 40, 50))
    dtype = data.draw(st.sampled_from(FLOATS))
    values = torch.randn(batch, count, width, generator=random).to(dtype)
    owner = torch.randint(-1, max(rows, 1), (batch, count), generator=random).clamp_max(rows - 1)
    weight = None
    if data.draw(st.booleans()):
        weight = (torch.rand(batch, count, generator=random) * 4 + 0.1).to(data.draw(st.sampled_from(FLOATS)))
    check(backend, values, owner, rows, weight, reduce)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 32, 64, 65, 127, 128, 200])
def test_widths(backend, random, width, dtype):
    """Vector tails, and rows that are or are not multiples of 16 bytes."""
    owner = torch.randint(0, 9, (2, 21), generator=random)
    values = torch.randn(2, 21, width, generator=random).to(dtype)
    for reduce in REDUCES:
        check(backend, values, owner, 9, torch.rand(2, 21, generator=random) + 0.5, reduce)


@pytest.mark.parametrize("count", [511, 512, 513, 1300])
def test_many_tokens_in_few_rows(backend, random, count):
    """As many as the CUDA kernel lists, and more."""
    values = torch.randint(-8, 9, (2, count, 8), generator=random).float()
    weight = torch.randint(1, 4, (2, count), generator=random).float()
    owner = torch.randint(0, 3, (2, count), generator=random)
    for reduce in REDUCES:
        check(backend, values, owner, 20, weight, reduce, beta=0.5)  # sums of integers are exact


def test_non_finite_values(backend):
    values = torch.tensor([[1.0, math.nan, 2.0, math.inf, -math.inf, math.inf, 3.0]]).reshape(1, 7, 1).repeat(1, 1, 9)
    owner = torch.tensor([[0, 0, 1, 1, 2, 2, 2]])
    for reduce in PLAIN:
        merged, _ = apply(backend, values, owner, 3, reduce=reduce)
        third = math.inf if reduce == "max" else math.nan
        expected = torch.tensor([math.nan, math.inf, third])[None, :, None].expand(1, 3, 9)
        torch.testing.assert_close(merged, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_rounds_to_nearest_even(backend, random, dtype):
    """Sums of two that lie between two numbers of the type, denormals and overflow included."""
    bits = torch.randint(0, 2**16, (1, 4096), generator=random).to(torch.uint16).view(dtype)
    values = torch.stack([bits, bits.roll(1) * 0.375], dim=1).reshape(1, 2, 4096)
    merged, _ = apply(backend, values, torch.zeros(1, 2, dtype=torch.int64), 1, reduce="sum")
    expected = (values[:, :1].float() + values[:, 1:].float()).to(dtype)
    torch.testing.assert_close(merged, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views(backend, random, dtype):
    values = torch.randn(30, 3, 40, generator=random).to(dtype).transpose(0, 1)[:, 1:29:2, 3:36]
    owner = torch.randint(-1, 6, (14, 3), generator=random).t()
    weight = (torch.rand(3, 28, generator=random) + 0.5).to(dtype)[:, ::2]
    for reduce in REDUCES:
        check(backend, values, owner, 6, weight, reduce)


def test_large_output(random):
    """Beyond the size at which the CPU writes past the caches."""
    values = torch.randn(2, 1500, 2048, generator=random)
    owner = torch.arange(1500).clamp_max(1398).expand(2, -1)
    merged, _ = torch.ops.vtk.merge_apply(values, owner, 1399)
    assert_same_bits(merged[:, :1398].contiguous(), values[:, :1398].contiguous())
    torch.testing.assert_close(merged[:, 1398], values[:, 1398:].mean(1), rtol=1e-5, atol=1e-6)


def test_same_bits_for_any_thread_count(random):
    values, owner = torch.randn(3, 900, 64, generator=random), torch.randint(-1, 300, (3, 900), generator=random)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.vtk.merge_apply(values, owner, 300))
    for other in results[1:]:
        assert_same_bits(other[0], results[0][0])
        assert_same_bits(other[1], results[0][1])


# Gradients.


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduce", REDUCES)
def test_gradient(random, reduce, weighted):
    values = torch.randn(2, 23, 5, generator=random)
    owner = torch.randint(-1, 6, (2, 23), generator=random)
    weight = torch.rand(2, 23, generator=random) + 0.5 if weighted else None
    upstream = torch.randn(2, 6, 5, generator=random)
    ours, exact = values.clone().requires_grad_(), values.double().requires_grad_()
    center = pick_centers(owner, 6, reduce)
    merged, _ = torch.ops.vtk.merge_apply(ours, owner, 6, weight=weight, reduce=reduce, center=center, beta=0.7)
    (merged * upstream).sum().backward()
    (reference.merge_apply(exact, owner, 6, weight, reduce, center, 0.7)[0] * upstream).sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)


class Float64Merge(torch.autograd.Function):
    """The reference forward with the family's backward formula."""

    @staticmethod
    def forward(ctx, values, owner, rows, weight, reduce, center):
        merged, total = reference.merge_apply(values, owner, rows, weight, reduce, center)
        ctx.saved = owner, weight, total, reduce, (values.detach(), merged.detach()), center
        return merged

    @staticmethod
    def backward(ctx, grad):
        return family.merge_gradient(grad, *ctx.saved), *[None] * 5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduce", REDUCES)
def test_gradcheck_in_float64(random, reduce, weighted):
    """The ops take no float64; their backward formula is plain torch and does."""
    values = torch.randn(2, 9, 3, generator=random, dtype=torch.float64).requires_grad_()
    owner = torch.randint(-1, 5, (2, 9), generator=random)
    weight = torch.rand(2, 9, generator=random, dtype=torch.float64) + 0.5 if weighted else None
    center = pick_centers(owner, 5, reduce)
    assert torch.autograd.gradcheck(lambda x: Float64Merge.apply(x, owner, 5, weight, reduce, center), values)


def test_gradient_of_a_maximum_goes_to_its_first_token():
    values = torch.tensor([[[2.0], [5.0], [5.0], [math.nan], [1.0]]]).requires_grad_()
    merged, _ = torch.ops.vtk.merge_apply(values, torch.tensor([[0, 0, 0, 1, 1]]), 3, reduce="max")
    merged.nan_to_num().sum().backward()
    assert values.grad[0, :, 0].tolist() == [0, 1, 0, 0, 0]


def test_gradient_in_bfloat16(random):
    values = torch.randn(1, 6, 4, generator=random).bfloat16().requires_grad_()
    merged, _ = torch.ops.vtk.merge_apply(values, torch.tensor([[0, 0, 0, 1, 2, 2]]), 3)
    merged.sum().backward()
    assert values.grad.dtype == torch.bfloat16
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1, 0.5, 0.5]).bfloat16()
    assert_same_bits(values.grad[0, :, 0].contiguous(), expected)


def test_compiles_whole(random):
    def merge(values, owner, weight):
        merged, total = torch.ops.vtk.merge_apply(values * 2, owner, 4, weight=weight.exp())
        return merged + 1, total

    values, owner = (
        torch.randn(2, 9, 6, generator=random).requires_grad_(),
        torch.randint(0, 4, (2, 9), generator=random),
    )
    weight = torch.randn(2, 9, generator=random)
    merged, _ = torch.compile(merge, fullgraph=True, backend="aot_eager")(values, owner, weight)
    assert_same_bits(merged.detach(), merge(values, owner, weight)[0].detach())
    merged.sum().backward()
    assert (values.grad != 0).all()


# Bad input.

X, OWNER = torch.zeros(2, 6, 3), torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(X[0], OWNER, 2), r"values of shape \[B, N, D\], got \[6, 3\]"),
        (lambda op: op(X.double(), OWNER, 2), r"values of dtype float32, float16 or bfloat16, got float64"),
        (lambda op: op(X.transpose(1, 2), OWNER, 2), r"values with a contiguous last dimension"),
        (lambda op: op(torch.zeros(0, 6, 2**26 + 1), OWNER[:0], 2), r"values with at most 67108864 channels"),
        (lambda op: op(X, OWNER, -1), r"out_len >= 0, got -1"),
        (lambda op: op(X, OWNER[:, :5], 2), r"owner.shape = \[B, N\] = \[2, 6\], got \[2, 5\]"),
        (lambda op: op(X, OWNER.int(), 2), r"owner of dtype int64, got int32"),
        (lambda op: op(X, OWNER, 2, reduce="median"), r'reduce to be .* got "median"'),
        (lambda op: op(X, OWNER, 2, reduce="pivot"), r'expected center with reduce="pivot"'),
        (lambda op: op(X, OWNER, 2, center=OWNER[:, :2]), r'expected no center with reduce="weighted_mean"'),
        (
            lambda op: op(X, OWNER, 2, reduce="beta", center=OWNER),
            r"center.shape = \[B, out_len\] = \[2, 2\], got \[2, 6\]",
        ),
        (lambda op: op(X, OWNER, 6, reduce="beta", center=OWNER.int()), r"center of dtype int64, got int32"),
        (lambda op: op(X, OWNER, 6, reduce="beta", center=OWNER, beta=math.nan), r"beta to be a finite number"),
        (lambda op: op(X, OWNER, 2, weight=X), r"weight.shape = \[B, N\] = \[2, 6\], got \[2, 6, 3\]"),
        (lambda op: op(X, OWNER, 2, weight=OWNER), r"weight of dtype float32, float16 or bfloat16, got int64"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::merge_apply.*" + message):
        call(backend.ops.merge_apply)


def test_owners_that_are_no_row(backend):
    values = torch.tensor([[[1.0], [2.0], [3.0]]])
    for bad in (2, -2, 2**40, -(2**63)):
        owner = torch.tensor([[0, bad, 1]])
        if backend.checks_values:
            with pytest.raises(RuntimeError, match=rf"vtk::merge_apply: .*out_len = 2, got owner\[0, 1\] = {bad}"):
                apply(backend, values, owner, 2)
        else:
            assert apply(backend, values, owner, 2)[0].flatten().tolist() == [1.0, 3.0]
    if backend.checks_values:
        with pytest.raises(RuntimeError, match="out_len = 0"):
            apply(backend, values, torch.zeros(1, 3, dtype=torch.int64), 0)


def test_weights_that_are_no_sizes(backend):
    values, owner = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[0, 0, 1]])
    for bad in (0.0, -1.0, math.nan, math.inf):
        weight = torch.tensor([[1.0, bad, 1.0]])
        if backend.checks_values:
            with pytest.raises(
                RuntimeError, match=r"vtk::merge_apply: expected weight > 0 and finite, got weight\[0, 1"
            ):
                apply(backend, values, owner, 2, weight)
        else:
            expected = (1 + 2 * torch.tensor(bad)) / (1 + torch.tensor(bad))
            torch.testing.assert_close(apply(backend, values, owner, 2, weight)[0][0, 0, 0], expected, equal_nan=True)


@pytest.mark.parametrize("reduce", CENTERED)
def test_centers_that_are_no_token_of_their_row(backend, reduce):
    """On CUDA the row has sources only: their terms of the sum, divided as if one of them were the center."""
    values, owner = torch.tensor([[[1.0], [8.0], [4.0], [2.0]]]), torch.tensor([[0, 0, 0, 1]])
    expected = {
        "target_plus_mean": 13 / 2,
        "beta": 0.4 * 13 / 2,
        "pivot": 13 / 6,
        "similarity_weighted": 13 / 3,
        "sequential_half": 1 / 4 + 8 / 2 + 4,
        "prune": 0.0,
    }
    for bad in (3, -1, 4, -2, 2**40):
        center = torch.tensor([[bad, 3]])
        if backend.checks_values:
            with pytest.raises(RuntimeError, match=rf"center to be a token of its row.*got center\[0, 0\] = {bad}"):
                apply(backend, values, owner, 2, None, reduce, center)
        else:
            merged, _ = apply(backend, values, owner, 2, None, reduce, center)
            assert merged[0, :, 0].tolist() == pytest.approx([expected[reduce], 2.0])


def test_center_of_a_row_without_tokens(backend):
    values, owner, center = torch.ones(1, 2, 4), torch.tensor([[1, 1]]), torch.tensor([[0, 1]])
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=r"center to be a token of its row.*got center\[0, 0\] = 0"):
            apply(backend, values, owner, 2, None, "pivot", center)
    else:
        assert not apply(backend, values, owner, 2, None, "pivot", center)[0][:, 0].any()
