from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vtkernels
from tests.reference import attention_scores as reference
from vtkernels.testing.compare import assert_close, assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Few and many rows, around the vector, register-tile and tile sizes of the kernels, and primes.
ROWS = [1, 2, 5, 6, 8, 9, 15, 16, 17, 33, 63, 65, 97, 131]
KEYS = [1, 2, 5, 6, 7, 8, 13, 16, 31, 47, 64, 65, 129, 577]


def native(query, key, **options):
    """Plain torch at the dtype of the inputs."""
    return reference.attention_scores(query, key, dtype=query.dtype, **options)


def check(backend, query, key, **options):
    on_device = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    out = backend.ops.attention_scores(backend.put(query), backend.put(key), **on_device)
    assert out.dtype == torch.float32 and out.is_contiguous()
    expected = reference.attention_scores(query, key, **options)
    # exp(x) is only as exact as its argument: an lse that is not the row's own makes x large, and a float32 x off by
    # one rounding is a relative error of |x| roundings in the score.
    largest = finite_max(expected)
    absolute = 5e-7 * largest * (1 + math.log1p(largest)) + 1e-30
    assert_close(out, expected, native(query, key, **options), absolute=absolute)
    return out


def finite_max(x: torch.Tensor) -> float:
    finite = x[torch.isfinite(x)].abs()
    return finite.max().item() if finite.numel() else 0.0


def inputs(random, batch=1, heads=2, key_heads=None, rows=3, keys=20, depth=16, dtype=torch.float32):
    query = torch.randn(batch, heads, rows, depth, generator=random).to(dtype)
    return query, torch.randn(batch, key_heads or heads, keys, depth, generator=random).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
def test_row_counts(backend, random, rows, dtype):
    check(backend, *inputs(random, rows=rows, keys=77, depth=32, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("keys", KEYS)
def test_key_counts(backend, random, keys, rows):
    check(backend, *inputs(random, rows=rows, keys=keys))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("depth", [1, 2, 3, 8, 15, 16, 17, 40, 64, 72, 80, 96, 128, 256])
def test_head_dimensions(backend, random, depth, dtype):
    for rows in (1, 12):
        check(backend, *inputs(random, rows=rows, depth=depth, dtype=dtype))


@QUICK
@given(data=st.data())
def test_any_combination(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    key_heads = data.draw(st.integers(1, 3))
    sizes = {name: data.draw(st.integers(1, most)) for name, most in {"rows": 40, "keys": 60, "depth": 40}.items()}
    query, key = inputs(
        random,
        batch=data.draw(st.integers(0, 3)),
        heads=key_heads * data.draw(st.integers(1, 4)),
        key_heads=key_heads,
        dtype=data.draw(st.sampled_from(FLOATS)),
        **sizes,
    )
    batch, heads, rows, keys = *query.shape[:3], key.shape[2]
    options = {
        "head_reduce": data.draw(st.sampled_from(["mean", "sum", "max", "none"])),
        "query_reduce": data.draw(st.sampled_from(["mean", "sum", "max"])),
        "causal": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        options["scale"] = data.draw(st.sampled_from([0.0, 1.0, -0.3, 3.0]))
    if data.draw(st.booleans()):
        options["lse"] = torch.randn(batch, heads, rows, generator=random) * 2 + 4
    if data.draw(st.booleans()):
        options["key_mask"] = torch.rand(batch, keys, generator=random) < data.draw(st.sampled_from([0.0, 0.5, 0.95]))
    if data.draw(st.booleans()):
        options["query_mask"] = torch.rand(batch, rows, generator=random) < data.draw(st.sampled_from([0.0, 0.5]))
    check(backend, query, key, **options)


@pytest.mark.parametrize("group", [1, 2, 3, 8, 16])
def test_grouped_queries(backend, random, group):
    for rows in (1, 7):
        check(backend, *inputs(random, batch=2, heads=2 * group, key_heads=2, rows=rows), head_reduce="none")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 4, 30])
def test_views_of_a_projection(backend, random, rows, dtype):
    """q and k as a vision tower has them: [B, N, 3 * H * D], split and transposed, batch-major or sliced."""
    projected = backend.put(torch.randn(3, 30, 3 * 2 * 24, generator=random).to(dtype))
    query, key, _ = (x.unflatten(-1, (2, 24)).transpose(1, 2) for x in projected.chunk(3, -1))
    query, key = query[::2, :, :rows], key[::2, :, 1:]
    expected = reference.attention_scores(query.cpu(), key.cpu())
    out = backend.ops.attention_scores(query, key)
    assert_close(out, expected, native(query.cpu(), key.cpu()))
    assert_same_bits(out, backend.ops.attention_scores(query.contiguous(), key.contiguous()))


def test_odd_offset_and_alignment(backend, random):
    base = torch.randn(2, 2, 12, 37, generator=random).half()
    for rows in (1, 12):
        check(backend, base[:, :, :rows, 1:20], base[..., 5:24])
        check(backend, base[:1, :, :rows, 1:20].expand(2, -1, -1, -1), base[..., 5:24])


def test_strided_masks_and_lse(backend, random):
    query, key = inputs(random, batch=2, rows=9, keys=20)
    key_mask = torch.rand(20, 2, generator=random).t() < 0.6
    query_mask = torch.rand(1, 9, generator=random).expand(2, -1) < 0.6
    lse = torch.randn(9, 2, 4, generator=random).permute(1, 2, 0)[:, ::2] + 4
    check(backend, query, key, key_mask=key_mask, query_mask=query_mask, lse=lse)
    check(backend, query, key, key_mask=key_mask, query_mask=query_mask)


@pytest.mark.parametrize("rows", [1, 20])
def test_span_of_a_longer_context(backend, random, rows):
    """With lse over all keys, the scores of a span are the span of the scores."""
    query, key = inputs(random, heads=4, key_heads=2, rows=rows, keys=90)
    logits = query.double() @ key.double().repeat_interleave(2, 1).transpose(-1, -2) / 4
    lse = torch.logsumexp(logits, -1).float()
    whole = backend.ops.attention_scores(*backend.put(query, key))
    span = backend.ops.attention_scores(*backend.put(query, key[:, :, 30:70]), lse=backend.put(lse))
    torch.testing.assert_close(span, whole[:, 30:70], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rows,keys", [(5, 20), (20, 20), (40, 20), (6, 5), (70, 100)])
def test_causal(backend, random, rows, keys):
    for reduce in ("mean", "max"):
        check(backend, *inputs(random, rows=rows, keys=keys), causal=True, query_reduce=reduce)


@pytest.mark.parametrize("rows", [1, 20])
def test_long_keys_are_streamed(backend, random, rows):
    query, key = inputs(random, heads=1, rows=rows, keys=9001, depth=8)
    check(backend, query, key)
    mask = torch.rand(1, 9001, generator=random) < 0.5
    check(backend, query * 20, key, causal=True, key_mask=mask, query_reduce="max")


def test_more_than_two_to_the_16_keys(backend, random):
    query, key = inputs(random, heads=1, rows=1, keys=70001, depth=4)
    check(backend, query, key)


@pytest.mark.parametrize("rows", [1, 20])
def test_nobody_votes_and_nothing_to_see(backend, random, rows):
    query, key = inputs(random, batch=2, rows=rows)
    for options in (
        {"query_mask": torch.zeros(2, rows, dtype=torch.bool)},
        {"key_mask": torch.zeros(2, 20, dtype=torch.bool)},
        {"lse": torch.full((2, 2, rows), -math.inf)},
        {"lse": torch.full((2, 2, rows), math.inf)},
    ):
        for reduce in ("mean", "sum", "max"):
            moved = {n: backend.put(v) for n, v in options.items()}
            out = backend.ops.attention_scores(*backend.put(query, key), query_reduce=reduce, **moved)
            assert out.shape == (2, 20) and (out == 0).all()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("keys", [20, 9001])
def test_nan_reaches_what_sees_it_and_nothing_else(backend, random, rows, keys):
    if keys > 1000 and backend.name == "simt":
        pytest.skip("only the CPU kernel streams long spans in another way")
    clean = inputs(random, batch=2, rows=rows, keys=keys, depth=8)
    for at in ("query", "key"):
        query, key = (x.clone() for x in clean)
        (query if at == "query" else key)[1, 0, 0, 3] = math.nan
        for reduce in ("mean", "max"):
            out = check(backend, query, key, query_reduce=reduce)
            assert out[0].isfinite().all() and out[1].isnan().all()
            check(backend, query, key, query_reduce=reduce, causal=True)
        hidden = {f"{name}_mask": torch.ones(2, n, dtype=torch.bool) for name, n in (("query", rows), ("key", keys))}
        hidden[f"{at}_mask"][1, 0] = False
        assert check(backend, query, key, **hidden).isfinite().all()
        check(backend, query, key, lse=torch.full((2, 2, rows), 3.0))


@pytest.mark.parametrize("rows", [1, 20])
def test_extreme_values(backend, random, rows):
    query, key = inputs(random, rows=rows)
    check(backend, query * 0, key)  # all ties
    check(backend, query * 1e-40, key)  # denormal
    check(backend, query * 1e4, key)  # one key takes all
    for value in (math.inf, -math.inf):
        infinite = key.clone()
        infinite[..., 4, :] = value
        check(backend, query.abs(), infinite)
    only = key.clone()
    only[...] = -math.inf
    assert (backend.ops.attention_scores(*backend.put(query.abs() + 1, only)) == 0).all()


@pytest.mark.parametrize("rows", [1, 20])
def test_sharp_rows_sum_to_one(backend, random, rows):
    query, key = inputs(random, rows=rows, keys=500)
    out = backend.ops.attention_scores(*backend.put(query * 30, key), query_reduce="mean", head_reduce="none")
    torch.testing.assert_close(out.sum(-1).cpu(), torch.ones(1, 2), atol=1e-5, rtol=0)


def test_empty(backend):
    assert backend.ops.attention_scores(*backend.put(torch.zeros(0, 2, 3, 4), torch.zeros(0, 2, 5, 4))).shape == (0, 5)
    for reduce, shape in (("mean", (2, 0)), ("none", (2, 4, 0))):
        query, key = backend.put(torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 0, 8))
        assert backend.ops.attention_scores(query, key, head_reduce=reduce).shape == shape


@pytest.mark.parametrize("rows", [1, 70, 200])
def test_same_bits_for_any_thread_count(random, rows):
    query, key = inputs(random, batch=2, heads=3, rows=rows, keys=700, depth=40, dtype=torch.bfloat16)
    for options in ({}, {"causal": True, "query_reduce": "max", "head_reduce": "max"}):
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(vtkernels.attention_scores(query, key, **options))
        for other in results[1:]:
            assert_same_bits(results[0], other)


def test_carries_no_gradient(random):
    query, key = (x.requires_grad_() for x in inputs(random))
    assert not vtkernels.attention_scores(query, key).requires_grad


def test_compiles_whole(random):
    def score(query, key):
        return vtkernels.attention_scores(query * 2, key, causal=True, head_reduce="none") + 1

    query, key = inputs(random, rows=8)
    assert_same_bits(torch.compile(score, fullgraph=True, backend="aot_eager")(query, key), score(query, key))


PEAK = """
import resource, torch, vtkernels
torch.set_num_threads(1)
query, key = torch.randn(1, 1, {rows}, 64), torch.randn(1, 1, {keys}, 64)
warm = vtkernels.attention_scores(query[:, :, :64], key[:, :, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vtkernels.attention_scores(query, key)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("rows,keys", [(8192, 8192), (2048, 32768)])
def test_extra_memory_does_not_grow_with_rows_times_keys(rows, keys):
    run = subprocess.run(
        [sys.executable, "-c", PEAK.format(rows=rows, keys=keys)], capture_output=True, text=True, check=True
    )
    kibibytes = int(run.stdout)
    assert kibibytes < 12 << 10, f"{kibibytes} KiB; the attention matrix would be {rows * keys // 256} KiB"


# Bad input: one clear error that names the op and the argument.
Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
BAD = {
    "expected query of shape": (Q[0], K, {}),
    "expected query of shape .*Q and D at least 1": (Q[:, :, :0], K, {}),
    "expected query of shape .*H, Q and D": (Q[:, :0], K, {}),
    "expected query of shape .*got .2, 4, 3, 0": (Q[..., :0], K[..., :0], {}),
    "expected query of dtype float32, float16 or bfloat16, got float64": (Q.double(), K.double(), {}),
    "expected query with a contiguous last dimension": (Q.transpose(2, 3), K, {}),
    "expected key of shape": (Q, K[0], {}),
    "expected key of dtype float32, got float16": (Q, K.half(), {}),
    "expected key with a contiguous last dimension": (Q, torch.zeros(2, 2, 8, 5).transpose(2, 3), {}),
    "expected key of shape .*B = 2 and D = 8": (Q, K[:1], {}),
    "expected key of shape .*D = 8 as in query": (Q, K[..., :4], {}),
    "expected key with a head count that divides the 4 heads": (Q, torch.zeros(2, 3, 5, 8), {}),
    "expected key with a head count": (Q, K[:, :0], {}),
    r"expected lse.shape = \[B, H, Q\]": (Q, K, {"lse": torch.zeros(2, 4, 2)}),
    "expected lse of dtype float32": (Q, K, {"lse": torch.zeros(2, 4, 3).half()}),
    r"expected key_mask.shape = \[B, N\] = \[2, 5\]": (Q, K, {"key_mask": torch.zeros(2, 4, dtype=torch.bool)}),
    "expected key_mask of dtype bool": (Q, K, {"key_mask": torch.zeros(2, 5)}),
    r"expected query_mask.shape = \[B, Q\]": (Q, K, {"query_mask": torch.zeros(1, 3, dtype=torch.bool)}),
    "expected query_mask of dtype bool": (Q, K, {"query_mask": torch.zeros(2, 3)}),
    "expected head_reduce to be": (Q, K, {"head_reduce": "min"}),
    "expected query_reduce to be": (Q, K, {"query_reduce": "none"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(backend, message):
    query, key, options = BAD[message]
    moved = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    with pytest.raises(RuntimeError, match=f"vtk::attention_scores: .*{message}"):
        backend.ops.attention_scores(backend.put(query), backend.put(key), **moved)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_mixed_devices():
    with pytest.raises(RuntimeError, match="expected key on the device of query"):
        vtkernels.attention_scores(Q.cuda(), K)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_graph_capture_and_stream(random):
    query, key = (x.cuda() for x in inputs(random, rows=40, keys=300))
    expected = vtkernels.attention_scores(query, key)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert_same_bits(vtkernels.attention_scores(query, key), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = vtkernels.attention_scores(query, key)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, expected)
