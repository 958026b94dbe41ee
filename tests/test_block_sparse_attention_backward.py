"""The backward pass of block_sparse_attention against autograd of the masked softmax, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vtkernels
from tests.attention_data import all_blocks, inputs, lists
from tests.reference import block_sparse_attention_backward as reference
from vtkernels.testing.compare import assert_close, assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def differentiate(backend, tensors, grad_out, grad_lse=None, **options):
    """The gradients on a backend, from its own forward pass."""
    put = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    query, key, value, counts, indices = (backend.put(t) for t in tensors)
    out, lse = backend.ops.block_sparse_attention(query, key, value, counts, indices, **put)
    grad_lse = None if grad_lse is None else backend.put(grad_lse)
    return backend.ops.block_sparse_attention_backward(
        backend.put(grad_out), query, key, value, out, lse, counts, indices, **put, grad_lse=grad_lse
    )


def gradients(random, query, *, strided=False):
    """Random gradients of out and lse."""
    batch, heads, rows, depth = query.shape
    shape = (batch, rows, heads, depth) if strided else (batch, heads, rows, depth)
    grad_out = torch.randn(shape, generator=random).to(query.dtype)
    return grad_out.transpose(1, 2) if strided else grad_out, torch.randn(query.shape[:3], generator=random)


def assert_gradients(found, expected, native):
    for gradient, exact, plain in zip(found, expected, native, strict=True):
        assert gradient.is_contiguous()
        # Sums are float32 and in another order than torch's; the result is rounded to the dtype of the inputs once.
        most = exact.abs().amax().item() if exact.numel() else 0.0
        unit = (
            16 * torch.finfo(torch.float32).eps if gradient.dtype == torch.float32 else torch.finfo(gradient.dtype).eps
        )
        assert_close(gradient, exact, plain, absolute=unit * max(most, 1.0))


def check(backend, random, *tensors, strided=False, **options):
    options = {"block_q": 64, "block_k": 64, **options}
    query = tensors[0]
    grad_out, grad_lse = gradients(random, query, strided=strided)
    found = differentiate(backend, tensors, grad_out, grad_lse, **options)
    assert all(g.dtype == query.dtype for g in found)
    expected, native = (
        reference.block_sparse_attention_backward(grad_out, *tensors, **options, grad_lse=grad_lse, dtype=dtype)
        for dtype in (torch.float64, query.dtype)
    )
    assert_gradients(found, expected, native)
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 65, 130])
def test_row_counts(backend, random, rows, dtype):
    check(backend, random, *inputs(random, rows, 150, dtype=dtype), *lists(random, rows, 3, heads=2), causal=True)


@pytest.mark.parametrize("keys", [1, 5, 7, 63, 64, 65, 97, 193])
def test_key_counts(backend, random, keys):
    check(backend, random, *inputs(random, 20, keys), *all_blocks(20, keys))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("depth", [1, 3, 15, 64, 72, 80, 96, 128, 256])
def test_head_dimensions(backend, random, depth, dtype):
    check(backend, random, *inputs(random, 20, 70, depth, heads=1, dtype=dtype), *all_blocks(20, 70), causal=True)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_grouped_queries(backend, random, group):
    tensors = inputs(random, 20, 70, heads=2 * group, key_heads=2)
    for heads in (1, 2 * group):
        check(backend, random, *tensors, *lists(random, 20, 2, heads=heads))


@QUICK
@given(data=st.data())
def test_any_combination(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    draw = {n: data.draw(st.integers(1, most)) for n, most in {"rows": 150, "keys": 200, "depth": 40}.items()}
    batch, key_heads = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2))
    heads = key_heads * data.draw(st.integers(1, 3))
    block_q, block_k = data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from([64, 128]))
    offsets = data.draw(st.booleans())
    tensors = inputs(random, draw["rows"], draw["keys"], draw["depth"], batch, heads, key_heads)
    limit = draw["keys"] if offsets else -(-draw["keys"] // block_k)

    def some(limit, density):
        shape = {"batch": data.draw(st.sampled_from([1, batch])), "heads": data.draw(st.sampled_from([1, heads]))}
        return lists(random, draw["rows"], limit, block_q, density=density, **shape)

    options = {"block_q": block_q, "block_k": block_k, "causal": data.draw(st.booleans()), "token_offsets": offsets}
    density = 3 / limit if offsets else 0.6
    if data.draw(st.booleans()):
        options["full_counts"], options["full_indices"] = some(limit, density)
    if data.draw(st.booleans()):
        options["column_counts"], options["column_indices"] = some(draw["keys"], 0.2)
    if data.draw(st.booleans()):
        bias = torch.randn(batch, draw["keys"], generator=random)
        options["key_bias"] = torch.where(bias < -1.0, -math.inf, bias)
    if data.draw(st.booleans()):
        options["seqlens_k"] = torch.randint(0, draw["keys"] + 1, (batch,), generator=random, dtype=torch.int32)
    check(backend, random, *tensors, *some(limit, density), **options, strided=data.draw(st.booleans()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_dense_attention(backend, random, dtype, causal):
    tensors = [x.requires_grad_() for x in inputs(random, 100, 160, 64, batch=2, dtype=dtype)]
    grad_out, _ = gradients(random, tensors[0])
    mask = torch.ones(100, 160, dtype=torch.bool).tril(60) if causal else None
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
    expected = torch.autograd.grad(dense, tensors, grad_out)
    given = [*(x.detach() for x in tensors), *all_blocks(100, 160)]
    found = differentiate(backend, given, grad_out, block_q=64, block_k=64, causal=causal)
    tolerance = 2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


def test_a_key_listed_in_every_way_at_once(backend, random):
    """Twice by number, in a full block and as columns, of which one twice."""
    counts, indices = torch.full((1, 1, 2), 3, dtype=torch.int32), torch.tensor([1, 0, 1], dtype=torch.int32)
    full, columns = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([70, 3, 70, 99], dtype=torch.int32)
    check(
        backend,
        random,
        *inputs(random, 90, 100),
        counts,
        indices.expand(1, 1, 2, 3),
        causal=True,
        full_counts=counts - 1,
        full_indices=full.expand(1, 1, 2, 2),
        column_counts=counts + 1,
        column_indices=columns.expand(1, 1, 2, 4),
    )


def test_scales(backend, random):
    for scale in (-0.3, 0.0, 3.0):
        check(backend, random, *inputs(random, 30, 70), *all_blocks(30, 70), scale=scale)


def test_queries_without_a_key(backend, random):
    """Their gradient is zero and what they hold reaches no key."""
    tensors = inputs(random, 70, 30)
    grad_out, grad_lse = gradients(random, tensors[0])
    for tensor in (tensors[0], grad_out):
        tensor[:, :, :40] = math.nan  # 30 keys: the first 40 queries see none
    options = {"block_q": 64, "block_k": 64, "causal": True}
    found = differentiate(backend, (*tensors, *all_blocks(70, 30)), grad_out, grad_lse, **options)
    assert (found[0][:, :, :40] == 0).all()
    seen = [tensors[0][:, :, 40:], *tensors[1:], *all_blocks(30, 30)]
    rest = differentiate(backend, seen, grad_out[:, :, 40:], grad_lse[:, :, 40:].contiguous(), **options)
    for a, b in zip((found[0][:, :, 40:], *found[1:]), rest, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_list_at_all(backend, random):
    counts, indices = all_blocks(70, 100)
    tensors = (*inputs(random, 70, 100), torch.zeros_like(counts), indices)
    for gradient in differentiate(backend, tensors, *gradients(random, tensors[0]), block_q=64, block_k=64):
        assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 9, 70), (1, 0, 70), (1, 9, 0)])
def test_empty(backend, random, shape):
    batch, rows, keys = shape
    tensors = (*inputs(random, rows, keys, batch=batch), *all_blocks(rows, keys))
    found = differentiate(backend, tensors, *gradients(random, tensors[0]), block_q=64, block_k=64)
    for gradient, tensor in zip(found, tensors, strict=False):
        assert gradient.shape == tensor.shape and (gradient == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_excluded_keys_are_not_read_and_get_no_gradient(backend, random, dtype):
    query, key, value = inputs(random, 70, 200, batch=2, dtype=dtype)
    bias = torch.randn(2, 200, generator=random)
    bias[:, 20:30] = -math.inf
    options = {"key_bias": bias, "seqlens_k": torch.tensor([180, 90], dtype=torch.int32)}
    columns = {"column_counts": torch.ones(1, 1, 2, dtype=torch.int32)}
    columns["column_indices"] = torch.full((1, 1, 2, 1), 140, dtype=torch.int32)
    counts, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    excluded = torch.ones(2, 200, dtype=torch.bool)
    excluded[:, :64] = excluded[0, 140] = False
    excluded[:, 20:30] = True
    for tensor in (key, value):
        tensor.masked_fill_(excluded[:, None, :, None], math.nan)
    _, grad_key, grad_value = check(backend, random, query, key, value, counts, indices, **options, **columns)
    for gradient in (grad_key, grad_value):
        gradient = gradient.transpose(1, 2).cpu()
        assert (gradient[excluded] == 0).all() and (gradient[~excluded] != 0).any(-1).all()


def test_a_nan_elsewhere_does_not_reach_a_key_that_nobody_lists(backend, random):
    query, key, value = inputs(random, 10, 64)
    columns = {"column_counts": torch.full((1, 1, 1), 2, dtype=torch.int32)}
    columns["column_indices"] = torch.tensor([3, 9], dtype=torch.int32).view(1, 1, 1, 2)
    grad_out, _ = gradients(random, query)
    query[:, :, 4], grad_out[:, :, 5] = math.nan, math.nan
    counts, indices = torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    _, *found = differentiate(backend, (query, key, value, counts, indices), grad_out, **columns)
    for gradient in found:
        assert gradient[:, :, [3, 9]].isnan().all()
        gradient[:, :, [3, 9]] = 0
        assert (gradient == 0).all()


def test_large_logits(backend, random):
    """Hidden keys whose logits are far above the log-sum-exp: their exponential would overflow."""
    query, key, value = inputs(random, 70, 70)
    query, key = query * 0 + 30, key * 0 + torch.linspace(-30, 30, 70)[:, None]
    tensors = (query, key, value, *all_blocks(70, 70))
    for gradient in differentiate(backend, tensors, *gradients(random, query), block_q=64, block_k=64, causal=True):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views(backend, random, dtype):
    packed = (torch.randn(2, n, 3 * 24, generator=random).to(dtype) for n in (20, 230, 230))
    heads = [x.unflatten(-1, (3, 24)).transpose(1, 2) for x in packed]
    counts, indices = lists(random, 20, 4, heads=3)
    strided = indices.repeat_interleave(2, 2)[:, :, ::2, :2]
    check(backend, random, *heads, counts.clamp(max=2), strided, strided=True)


@pytest.mark.parametrize("rows", [3, 150])
def test_same_bits_for_any_thread_count(random, rows):
    tensors = (*inputs(random, rows, 1000, 32, heads=4, key_heads=2), *lists(random, rows, 16, heads=4))
    out, lse = torch.ops.vtk.block_sparse_attention(*tensors, block_q=64, block_k=64, causal=True)
    grad_out, grad_lse = gradients(random, out)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            torch.ops.vtk.block_sparse_attention_backward(
                grad_out, *tensors[:3], out, lse, *tensors[3:], block_q=64, block_k=64, causal=True, grad_lse=grad_lse
            )
        )
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b)


# Autograd: the op's own, on the CPU.


def attend(query, key, value, lists, **options):
    return vtkernels.block_sparse_attention(query, key, value, *lists, block_q=64, block_k=64, causal=True, **options)


@pytest.mark.filterwarnings("ignore:Input .* is not a double precision:UserWarning")
def test_gradcheck(random):
    tensors = [x.requires_grad_() for x in inputs(random, 4, 5, depth=3, heads=2, key_heads=1)]
    # The op computes in float32: a step whose square is its rounding error.
    check = {"eps": 1e-2, "atol": 5e-3, "rtol": 5e-3, "nondet_tol": 0.0, "fast_mode": False}
    listed = all_blocks(4, 5)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, listed), tensors, **check)


@pytest.mark.parametrize("of", ["out", "lse", "both"])
def test_autograd_calls_the_op(random, of):
    tensors = [x.requires_grad_() for x in inputs(random, 9, 70)]
    bias, listed = torch.randn(1, 70, generator=random), all_blocks(9, 70)
    out, lse = attend(*tensors, listed, key_bias=bias)
    parts = {"out": [out], "lse": [lse], "both": [out, lse]}[of]
    # .sum() hands over expanded gradients, strides 0.
    found = torch.autograd.grad(sum(x.sum() for x in parts), tensors)
    grad_out = torch.ones_like(out) if of != "lse" else torch.zeros_like(out)
    grad_lse = torch.ones_like(lse) if of != "out" else None
    options = {"block_q": 64, "block_k": 64, "causal": True, "key_bias": bias, "grad_lse": grad_lse}
    expected, native = (
        reference.block_sparse_attention_backward(grad_out, *tensors, *listed, **options, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_gradients(found, expected, native)


def test_a_training_step_compiles_whole(random):
    tensors = [x.requires_grad_() for x in inputs(random, 9, 70, depth=8)]
    listed = all_blocks(9, 70)

    def loss(query, key, value):
        out, lse = attend(query, key, value, listed, key_bias=torch.zeros(1, 70))
        return (out.square().sum() + lse.sum()) * 0.5

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(loss(*tensors), tensors)
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), eager, strict=True):
        assert_same_bits(a, b)


def test_what_has_no_gradient_says_so(random):
    tensors, listed = [x.requires_grad_() for x in inputs(random, 9, 70)], all_blocks(9, 70)
    with pytest.raises(NotImplementedError, match="block_sparse_attention: key_bias requires a gradient"):
        attend(*tensors, listed, key_bias=torch.zeros(1, 70, requires_grad=True))
    out, _ = attend(*tensors, listed)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


Q, K, LSE = torch.zeros(2, 4, 9, 8), torch.zeros(2, 2, 70, 8), torch.zeros(2, 4, 9)
LISTS = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda op: op(Q[:1], Q, K, K, Q, LSE, *LISTS),
            r"grad_out.shape = query.shape = \[B, H, Q, D\] = \[2, 4, 9, 8\]",
        ),
        (lambda op: op(Q.half(), Q, K, K, Q, LSE, *LISTS), r"grad_out of dtype float32, got float16"),
        (lambda op: op(Q[..., :1].expand(Q.shape), Q, K, K, Q, LSE, *LISTS), r"grad_out with a contiguous last dim"),
        (lambda op: op(Q, Q, K, K, Q[:, :3], LSE, *LISTS), r"out.shape = query.shape .* got \[2, 3, 9, 8\]"),
        (lambda op: op(Q, Q, K, K, Q[:1].expand(Q.shape), LSE, *LISTS), r"out to be contiguous; call out.contiguous"),
        (lambda op: op(Q, Q, K, K, Q, LSE.double(), *LISTS), r"lse of dtype float32, got float64"),
        (lambda op: op(Q, Q, K, K, Q, LSE[..., :8], *LISTS), r"lse.shape = \[B, H, Q\] = \[2, 4, 9\], got \[2, 4, 8\]"),
        (lambda op: op(Q, Q, K, K, Q, LSE[:1].expand(LSE.shape), *LISTS), r"lse to be contiguous"),
        (lambda op: op(Q, Q, K, K, Q, LSE, *LISTS, grad_lse=LSE[0]), r"grad_lse.shape = \[B, H, Q\] = \[2, 4, 9\]"),
        (lambda op: op(Q, Q, K, K, Q, LSE, *LISTS, grad_lse=LSE[:1].expand(LSE.shape)), r"grad_lse to be contiguous"),
        (lambda op: op(Q, Q, K.half(), K, Q, LSE, *LISTS), r"key of dtype float32, got float16"),
        (lambda op: op(Q, Q, K, K, Q, LSE, *LISTS, key_bias=Q), r"key_bias.shape = \[B, N\]"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::block_sparse_attention_backward.*" + message):
        call(backend.ops.block_sparse_attention_backward)


def test_lists_that_do_not_fit(backend):
    """An error on the CPU; passed over, and never read, by the CUDA kernels."""
    given = [Q, Q, K, K, Q, LSE, LISTS[0] + 2, LISTS[1] + 2]
    if backend.checks_values:
        with pytest.raises(
            RuntimeError, match=r"vtk::block_sparse_attention_backward: expected 0 <= block_counts <= 2"
        ):
            backend.ops.block_sparse_attention_backward(*given)
    else:
        for gradient in backend.ops.block_sparse_attention_backward(*(backend.put(x) for x in given)):
            assert (gradient == 0).all()
