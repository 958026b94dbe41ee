"""block_sparse_attention against the softmax over its listed keys, in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vtkernels
from tests.attention_data import all_blocks, inputs, lists
from tests.covering import pairwise
from tests.reference import block_sparse_attention as reference
from vtkernels.testing.compare import assert_close, assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
WIDE_AND_NARROW = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(backend, tensors, **options):
    on_device = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    return backend.ops.block_sparse_attention(*(backend.put(t) for t in tensors), **on_device)


def check(backend, query, key, value, counts, indices, **options):
    options = {"block_q": 64, "block_k": 64, **options}
    tensors = (query, key, value, counts, indices)
    out, lse = run(backend, tensors, **options)
    assert out.dtype == query.dtype and lse.dtype == torch.float32 and out.is_contiguous()
    expected, expected_lse = reference.block_sparse_attention(*tensors, **options)
    native, native_lse = reference.block_sparse_attention(*tensors, **options, dtype=query.dtype)
    # The result is rounded to the dtype of the inputs once.
    largest = expected.abs().amax().item() if expected.numel() else 0.0
    absolute = 2e-6 if query.dtype == torch.float32 else torch.finfo(query.dtype).eps * largest
    assert_close(out, expected, native, absolute=absolute)
    assert_close(lse, expected_lse, native_lse, absolute=2e-5)
    return out, lse


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 16, 17, 63, 64, 65, 130])
def test_row_counts(backend, random, rows, dtype):
    check(backend, *inputs(random, rows, 150, dtype=dtype), *lists(random, rows, 3, heads=2), causal=rows <= 150)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("keys", [1, 5, 6, 7, 63, 64, 65, 95, 96, 97, 193])
def test_key_counts(backend, random, keys, rows):
    check(backend, *inputs(random, rows, keys), *all_blocks(rows, keys))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("depth", [1, 3, 8, 15, 32, 64, 72, 80, 96, 128, 256])
def test_head_dimensions(backend, random, depth, dtype):
    for rows in (2, 20):
        check(backend, *inputs(random, rows, 70, depth, heads=1, dtype=dtype), *all_blocks(rows, 70))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 40])
def test_grouped_queries(backend, random, rows, group):
    tensors = inputs(random, rows, 130, heads=2 * group, key_heads=2)
    shared = lists(random, rows, 3)
    own = lists(random, rows, 3, heads=2 * group)
    for counts, indices in (shared, own):
        check(backend, *tensors, counts, indices)


@pytest.mark.parametrize(
    ("depth", "dtype", "kind", "own_lists", "group", "sizes"),
    pairwise(
        [64, 72, 80, 96, 128, 256],
        FLOATS,
        ["partial", "full", "columns", "token_offsets"],
        [False, True],
        [1, 2, 4],
        [(3, 70), (66, 66), (70, 20)],
    ),
)
def test_pairs_of_options_under_the_causal_mask(backend, random, depth, dtype, kind, own_lists, group, sizes):
    rows, keys = sizes
    heads = max(group, 2)
    tensors = inputs(random, rows, keys, depth, heads=heads, key_heads=heads // group, dtype=dtype)

    def some(limit, density):
        return lists(random, rows, limit, heads=heads if own_lists else 1, density=density)

    counts, indices = some(-(-keys // 64), 0.6)
    options = {}
    if kind == "full":
        options["full_counts"], options["full_indices"] = some(-(-keys // 64), 0.6)
    elif kind == "columns":
        options["column_counts"], options["column_indices"] = some(keys, 0.3)
    elif kind == "token_offsets":
        counts, indices = some(keys, 3 / keys)
        options["token_offsets"] = True
    check(backend, *tensors, counts, indices, causal=True, **options)


@QUICK
@given(data=st.data())
def test_any_combination(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    draw = {n: data.draw(st.integers(1, most)) for n, most in {"rows": 90, "keys": 200, "depth": 40}.items()}
    batch, key_heads = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2))
    heads = key_heads * data.draw(st.integers(1, 3))
    block_q, block_k = data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from([64, 128]))
    offsets = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(FLOATS))
    tensors = inputs(random, draw["rows"], draw["keys"], draw["depth"], batch, heads, key_heads, dtype)
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
    check(backend, *tensors, *some(limit, density), **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 100])
def test_all_blocks_are_dense_attention(backend, random, rows, causal):
    tensors = inputs(random, rows, 160, 64, batch=2)
    out, _ = run(backend, (*tensors, *all_blocks(rows, 160)), block_q=64, block_k=64, causal=causal)
    mask = torch.ones(rows, 160, dtype=torch.bool).tril(160 - rows) if causal else None
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
    torch.testing.assert_close(out.cpu(), dense, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [3, 64])
def test_the_order_of_a_list_changes_no_more_than_rounding(backend, random, rows):
    tensors = inputs(random, rows, 150)
    counts, indices = all_blocks(rows, 150)
    columns = torch.randperm(150, generator=random).int().expand(1, 1, -(-rows // 64), -1)
    column_counts = torch.full_like(counts, 100)
    listed = [counts, indices, counts, indices, column_counts, columns[..., :100].contiguous()]
    results = []
    for turned in (False, True):
        turn = [x.flip(-1).contiguous() if turned and x.dim() == 4 else x for x in listed]
        names = ("full_counts", "full_indices", "column_counts", "column_indices")
        options = dict(zip(names, turn[2:], strict=True))
        results.append(run(backend, (*tensors, *turn[:2]), block_q=64, block_k=64, causal=True, **options))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("again", ["block", "full", "column", "offset"])
@pytest.mark.parametrize("rows", [3, 30])
def test_a_key_listed_twice_counts_twice(backend, random, rows, again):
    tensors = inputs(random, rows, 64)
    once = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 2, dtype=torch.int32)
    twice, options = once, {}
    if again == "full":
        options["full_counts"], options["full_indices"] = once
    elif again == "column":
        keys = torch.arange(64, dtype=torch.int32).expand(1, 1, 1, 64)
        options["column_counts"], options["column_indices"] = once[0] * 64, keys
    else:
        twice, options = (once[0] * 2, once[1]), {"token_offsets": again == "offset"}
    out, lse = run(backend, (*tensors, *twice), block_q=64, block_k=64, **options)
    single, single_lse = run(backend, (*tensors, *once), block_q=64, block_k=64)
    torch.testing.assert_close(out, single, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, single_lse + math.log(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 70])
def test_scores_from_lse_are_columns_of_the_softmax(backend, random, rows):
    """attention_scores reads what a key receives from q, k and the lse of this pass."""
    query, key, value = inputs(random, rows, 130, heads=4, key_heads=2)
    on_device = backend.put(query, key)
    _, lse = run(backend, (query, key, value, *all_blocks(rows, 130)), block_q=64, block_k=64, causal=True)
    logits = query.double() @ key.double().repeat_interleave(2, 1).mT / 4
    seen = torch.ones(rows, 130, dtype=torch.bool).tril(130 - rows)
    softmax = logits.masked_fill(~seen, -math.inf).softmax(-1)
    scores = backend.ops.attention_scores(*on_device, lse=lse, causal=True, head_reduce="none")
    torch.testing.assert_close(scores.cpu().double(), softmax.mean(2), rtol=1e-4, atol=1e-6)
    # A pruning method asks what the last query gives to a span of keys.
    last, span = on_device[0][:, :, -1:], on_device[1][:, :, 20:90]
    scores = backend.ops.attention_scores(last, span, lse=lse[:, :, -1:], head_reduce="none")
    torch.testing.assert_close(scores.cpu().double(), softmax[:, :, -1, 20:90], rtol=1e-4, atol=1e-6)


@WIDE_AND_NARROW
@pytest.mark.parametrize("rows", [2, 30])
def test_queries_without_a_key(backend, random, rows, dtype):
    tensors = inputs(random, rows, 70, dtype=dtype)
    counts, indices = all_blocks(rows, 70)
    for options in ({"key_bias": torch.full((1, 70), -math.inf)}, {"seqlens_k": torch.zeros(1, dtype=torch.int32)}):
        out, lse = run(backend, (*tensors, counts, indices), block_q=64, block_k=64, **options)
        assert (out == 0).all() and (lse == -math.inf).all()
    out, lse = run(backend, (*tensors, torch.zeros_like(counts), indices), block_q=64, block_k=64)
    assert (out == 0).all() and (lse == -math.inf).all()
    # More queries than keys: the first see nothing.
    short = inputs(random, rows, 1, dtype=dtype)
    out, lse = check(backend, *short, *all_blocks(rows, 1), causal=True)
    assert (out[:, :, :-1] == 0).all() and (lse[:, :, :-1] == -math.inf).all() and torch.isfinite(lse[:, :, -1]).all()


@WIDE_AND_NARROW
@pytest.mark.parametrize("rows", [2, 30])
def test_non_finite_values_stay_where_they_are(backend, random, rows, dtype):
    query, key, value = inputs(random, rows, 70, dtype=dtype)
    query[:, 0, 1] = math.nan
    key[:, :, 3], value[:, :, 5] = math.nan, math.inf  # excluded
    bias = torch.zeros(1, 70)
    bias[:, [3, 5]] = -math.inf
    out, lse = run(backend, (query, key, value, *all_blocks(rows, 70)), block_q=64, block_k=64, key_bias=bias)
    hit = torch.zeros(1, 2, rows, dtype=torch.bool)
    hit[:, 0, 1] = True
    assert torch.equal(out.isnan().all(-1).cpu(), hit) and torch.equal(lse.isnan().cpu(), hit)
    assert torch.isfinite(out.cpu()[~hit]).all()
    key[:, :, 3] = 0.0
    key[:, :, 7] = math.nan  # seen by all
    out, lse = run(backend, (query, key, value, *all_blocks(rows, 70)), block_q=64, block_k=64, key_bias=bias)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("rows", [2, 30])
def test_extreme_logits(backend, random, rows, scale):
    query, key, value = inputs(random, rows, 200)
    out, lse = run(backend, (query, key, value, *all_blocks(rows, 200)), block_q=64, block_k=64, scale=scale)
    expected, expected_lse = reference.block_sparse_attention(
        query, key, value, *all_blocks(rows, 200), block_q=64, block_k=64, scale=scale
    )
    assert torch.isfinite(out).all()
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-5, atol=1e-5)
    if scale < 1:
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 30])
def test_negative_scale(backend, random, rows):
    check(backend, *inputs(random, rows, 130), *all_blocks(rows, 130), scale=-0.3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views(backend, random, dtype):
    query, key, value = (torch.randn(2, n, 3 * 24, generator=random).to(dtype) for n in (20, 230, 230))
    heads = [x.unflatten(-1, (3, 24)).transpose(1, 2) for x in (query, key, value)]
    counts, indices = lists(random, 20, 4, heads=3)
    strided = indices.repeat_interleave(2, 2)[:, :, ::2, :2]
    check(backend, *heads, counts.clamp(max=2), strided)


@pytest.mark.parametrize("rows", [1, 20])
def test_long_lists_are_cut_into_parts(backend, random, rows):
    keys = 1_100 if backend.name == "simt" else 10_000
    tensors = inputs(random, rows, keys, 32, heads=4, key_heads=1)
    check(backend, *tensors, *lists(random, rows, -(-keys // 64), density=0.9), causal=True)


@WIDE_AND_NARROW
@pytest.mark.parametrize("rows", [1, 150])
def test_same_bits_for_any_thread_count(random, rows, dtype):
    tensors = (*inputs(random, rows, 5000, 32, heads=4, dtype=dtype), *lists(random, rows, 79, heads=4))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.vtk.block_sparse_attention(*tensors, block_q=64, block_k=64, causal=True))
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


@pytest.mark.parametrize("isa", ["generic+bf16", "avx2+bf16"])
def test_products_of_bfloat16_in_pairs(isa):
    """What processors with AVX512_BF16 run, computed without the instruction: the tests in bfloat16 once more."""
    chosen = "(cpu and (dtype2 or any_combination or bfloat16)) or (same_bits and bfloat16)"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", chosen, __file__]
    run = subprocess.run(command, env={**os.environ, "VTK_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_compiles_whole(random):
    tensors = (*inputs(random, 9, 70), *all_blocks(9, 70))

    def attend(*tensors):
        return vtkernels.block_sparse_attention(*tensors, block_q=64, block_k=64, causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*tensors), attend(*tensors), strict=True):
        assert_same_bits(a, b)


Q, K = torch.zeros(2, 4, 9, 8), torch.zeros(2, 2, 70, 8)
COUNTS, INDICES = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(Q[0], K, K, COUNTS, INDICES), r"query of shape \[B, H, Q, D\], got \[4, 9, 8\]"),
        (lambda op: op(Q.double(), K, K, COUNTS, INDICES), r"query of dtype float32, float16 or bfloat16, got float64"),
        (lambda op: op(Q, K.half(), K, COUNTS, INDICES), r"key of dtype float32, got float16"),
        (lambda op: op(Q, K[:1], K, COUNTS, INDICES), r"key of shape \[B, Hk, N, D\] with B = 2 and D = 8"),
        (lambda op: op(Q[:, :3], K, K, COUNTS, INDICES), r"key with a head count that divides the 3 heads of query"),
        (lambda op: op(Q, K, K[:, :, :60], COUNTS, INDICES), r"value.shape = key.shape = .* got \[2, 2, 60, 8\]"),
        (lambda op: op(Q.mT, K, K, COUNTS, INDICES), r"query with a contiguous last dimension"),
        (lambda op: op(torch.zeros(1, 1, 1, 257), K, K, COUNTS, INDICES), r"query with D from 1 to 256"),
        (lambda op: op(torch.zeros(1, 1, 1, 0), K, K, COUNTS, INDICES), r"query with D from 1 to 256"),
        (lambda op: op(Q, K, K, COUNTS, INDICES.long()), r"block_indices of dtype int32, got int64"),
        (lambda op: op(Q, K, K, COUNTS, INDICES, block_q=32), r"block_q to be 64 or 128, got 32"),
        (lambda op: op(Q, K, K, COUNTS, INDICES, block_k=256), r"block_k to be 64 or 128, got 256"),
        (lambda op: op(Q, K, K, COUNTS.long(), INDICES), r"block_counts of dtype int32, got int64"),
        (lambda op: op(Q, K, K, COUNTS[0], INDICES), r"block_counts of shape \[B \| 1, H \| 1, Mq\]"),
        (lambda op: op(Q, K, K, COUNTS, INDICES.expand(1, 3, 1, 2)), r"block_indices of shape .* got \[1, 3, 1, 2\]"),
        (lambda op: op(Q, K, K, COUNTS, INDICES, full_counts=COUNTS), r"full_counts and full_indices together"),
        (lambda op: op(Q, K, K, COUNTS, INDICES, key_bias=torch.zeros(2, 9)), r"key_bias.shape = \[B, N\] = \[2, 70\]"),
        (lambda op: op(Q, K, K, COUNTS, INDICES, key_bias=torch.zeros(2, 70).half()), r"key_bias of dtype float32"),
        (lambda op: op(Q, K, K, COUNTS, INDICES, seqlens_k=torch.ones(2)), r"seqlens_k of dtype int32, got float32"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::block_sparse_attention.*" + message):
        call(backend.ops.block_sparse_attention)


@pytest.mark.parametrize("moved", ["key", "block_counts", "block_indices", "key_bias", "seqlens_k"])
def test_tensors_of_another_device(backend, moved):
    if backend.name != "cuda":
        pytest.skip("there is one device")
    given = {"query": Q, "key": K, "value": K, "block_counts": COUNTS, "block_indices": INDICES}
    given |= {"key_bias": torch.zeros(2, 70), "seqlens_k": torch.ones(2, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=f"vtk::block_sparse_attention: expected {moved} on the device of query"):
        backend.ops.block_sparse_attention(**{n: t if n == moved else backend.put(t) for n, t in given.items()})


@pytest.mark.parametrize("token_offsets", [False, True])
@pytest.mark.parametrize("rows", [1, 20])
def test_as_many_keys_as_numbers_allow(backend, random, rows, token_offsets):
    """Keys that share one row of memory: no sum of key numbers may leave 32 bits."""
    keys = 2**31 - 128
    query, key, value = (backend.put(x) for x in inputs(random, rows, 1, 8, heads=1))
    last = keys - 1 if token_offsets else -(-keys // 128) - 1
    given = {
        "block_counts": torch.full((1, 1, 1), 2, dtype=torch.int32),
        "block_indices": torch.tensor([0, last], dtype=torch.int32).expand(1, 1, 1, 2),
        "column_counts": torch.ones(1, 1, 1, dtype=torch.int32),
        "column_indices": torch.full((1, 1, 1, 1), keys - 1, dtype=torch.int32),
    }

    def call(keys):
        many = (x.expand(1, 1, keys, 8) for x in (key, value))
        options = {n: backend.put(t) for n, t in given.items()} | {"causal": True, "token_offsets": token_offsets}
        return backend.ops.block_sparse_attention(query, *many, **options)

    out, lse = call(keys)
    torch.testing.assert_close(out, value.expand(1, 1, rows, 8), rtol=1e-5, atol=1e-5)
    listed = 128 + (1 if token_offsets else keys - 128 * last) + 1
    expected = (query @ key.mT)[..., 0] / 8**0.5 + math.log(listed)
    torch.testing.assert_close(lse[..., -1], expected[..., -1], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=f"expected key with at most {keys} rows, got {keys + 1}"):
        call(keys + 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_counts": COUNTS + 2}, r"0 <= block_counts <= 2 .* got 3 for query block 0 of head 0"),
        ({"block_counts": COUNTS - 2}, r"0 <= block_counts <= 2 .* got -1"),
        ({"block_indices": INDICES + 2}, r"0 <= block_indices < 2, got 2"),
        ({"block_indices": INDICES - 1}, r"0 <= block_indices < 2, got -1"),
        ({"block_indices": INDICES + 70, "token_offsets": True}, r"0 <= block_indices < 70, got 70"),
        ({"column_counts": COUNTS, "column_indices": INDICES + 70}, r"0 <= column_indices < 70, got 70"),
        ({"seqlens_k": torch.tensor([3, 71], dtype=torch.int32)}, r"0 <= seqlens_k <= N = 70, got seqlens_k\[1\] = 71"),
    ],
)
def test_lists_that_do_not_fit(backend, changed, message):
    """An error on the CPU; passed over, and never read, by the CUDA kernels."""
    given = {"block_counts": COUNTS, "block_indices": INDICES, "block_q": 64, "block_k": 64, **changed}
    tensors = (Q, K, K)
    if backend.checks_values:
        with pytest.raises(RuntimeError, match="vtk::block_sparse_attention: expected " + message):
            run(backend, tensors, **given)
    else:
        out, lse = run(backend, tensors, **given)
        assert torch.isfinite(out).all() and not lse.isnan().any()


@pytest.mark.parametrize("token_offsets", [False, True])
@pytest.mark.parametrize("rows", [2, 90])
def test_garbage_in_lists_is_passed_over(backend, random, rows, token_offsets):
    if backend.checks_values:
        pytest.skip("the CPU reports it")
    entries = torch.tensor([-(2**31), -1, 0, 1, 5, 64, 69, 70, 2**24, 2**31 - 1], dtype=torch.int32)
    options = {"token_offsets": token_offsets, "causal": True, "seqlens_k": torch.tensor([71], dtype=torch.int32)}
    for name, count in {"block": 11, "full": -1, "column": 2**31 - 1}.items():
        options[f"{name}_counts"] = torch.full((1, 1, -(-rows // 64)), count, dtype=torch.int32)
        options[f"{name}_indices"] = entries.expand(1, 1, -(-rows // 64), -1)
    tensors = inputs(random, rows, 70)
    out, lse = run(backend, tensors, block_q=64, block_k=64, **options)
    valid = [0, 1, 5, 64, 69] if token_offsets else [0, 1]
    cleaned = {"token_offsets": token_offsets, "causal": True}
    for name, kept in {"block": valid, "column": [0, 1, 5, 64, 69]}.items():
        cleaned[f"{name}_counts"] = torch.full_like(options["block_counts"], len(kept))
        cleaned[f"{name}_indices"] = torch.tensor(kept, dtype=torch.int32).expand(1, 1, -(-rows // 64), -1)
    expected, expected_lse = reference.block_sparse_attention(*tensors, block_q=64, block_k=64, **cleaned)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-5, atol=1e-5)
