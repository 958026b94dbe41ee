"""rule_attention against masked softmaxes in float64, the masks made from the definitions of the methods."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vtkernels
from tests.reference import rule_attention as reference
from vtkernels.attention import BlockLists, Rule, rules
from vtkernels.testing.compare import assert_close, assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = 2**31 - 1


def inputs(random, rows, keys, depth=16, batch=1, heads=2, key_heads=None, dtype=torch.float32):
    shapes = [(heads, rows), (key_heads or heads, keys), (key_heads or heads, keys)]
    return [torch.randn(batch, h, n, depth, generator=random).to(dtype) for h, n in shapes]


def rule_of(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def run(backend, tensors, rule, **options):
    on_device = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    return backend.ops.rule_attention(*(backend.put(t) for t in (*tensors, rule)), **on_device)


def compare(got, expected, native):
    """The result is rounded to the dtype of the inputs once."""
    (out, lse), dtype = got, got[0].dtype
    largest = expected[0].abs().amax().item() if expected[0].numel() else 0.0
    assert_close(
        out, expected[0], native[0], absolute=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * largest
    )
    assert_close(lse, expected[1], native[1], absolute=2e-5)


def check(backend, tensors, rule, **options):
    """Against the definition of the five numbers."""
    got = run(backend, tensors, rule, **options)
    assert got[0].dtype == tensors[0].dtype and got[1].dtype == torch.float32 and got[0].is_contiguous()
    expected = reference.rule_attention(*tensors, rule, **options)
    compare(got, expected, reference.rule_attention(*tensors, rule, **options, dtype=tensors[0].dtype))
    return got


def check_mask(backend, tensors, rule, mask):
    """Against a mask [H, Q, N] or [Q, N]."""
    mask = mask.expand(*tensors[0].shape[:3], tensors[1].shape[2])
    expected, native = (reference.masked(*tensors, mask, dtype=t) for t in (torch.float64, tensors[0].dtype))
    compare(run(backend, tensors, rule.numbers), expected, native)


def grid(rows, keys, sees):
    """bool [Q, N]: sees(position of the query, position of the key) where that is no later, the last query last."""
    first = keys - rows
    return torch.tensor([[j <= t and sees(t, j) for j in range(keys)] for t in range(first, keys)])


SHAPES = [(1, 200), (3, 200), (70, 200)]


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize(("sink", "local"), [(0, 1), (4, 20), (70, 64), (1, 400)])
def test_streaming(backend, random, rows, keys, sink, local):
    """Block-Sparse-Attention's exact streaming hides keys after the query, and those before its last `local` ones,
    itself among these, that are not sinks."""

    def sees(row, col):
        return not (col < row - (local - 1) and col >= sink)

    check_mask(backend, inputs(random, rows, keys), Rule.streaming(sink, local), grid(rows, keys, sees))


def test_docstring_examples():
    result = doctest.testmod(rules)
    assert result.attempted > 0 and result.failed == 0


def test_a_shape_is_streaming():
    assert torch.equal(Rule.a_shape(100, 800).numbers, Rule.streaming(100, 800).numbers)


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
def test_moa(backend, random, rows, keys):
    """One global block of 64 and a band of blocks up to the query's own: spans of 192, 128 (the least) and 320."""
    alphas, betas = [192.0, 0.0, -128.0], [0.0, 0.125, 1.0]
    bands = [2, 1, 6]

    def head(band):
        return grid(rows, keys, lambda row, col: col // 64 == 0 or row // 64 - col // 64 < band)

    rule = Rule.moa(alphas, betas, 513)
    check_mask(backend, inputs(random, rows, keys, heads=3), rule, torch.stack([head(band) for band in bands]))


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("homogeneous", [False, True])
def test_strided(backend, random, rows, keys, homogeneous):
    """S2-Attention keeps key block k of query block q if q - k < local or (k + h step + 1) is a multiple of stride."""
    heads, stride, local = 2, 3, 1
    step = 0 if homogeneous else max(1, stride // heads)

    def head(h):
        def sees(row, col):
            q, k = row // 64, col // 64
            return q - k < local or (k + h * step + 1) % stride == 0

        return grid(rows, keys, sees)

    rule = Rule.strided(local, stride, heads, homogeneous=homogeneous)
    check_mask(backend, inputs(random, rows, keys), rule, torch.stack([head(h) for h in range(heads)]))


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize(("chunk", "previous", "first"), [(36, 0, 0), (50, 2, 13), (100, 1, 140)])
def test_chunked(backend, random, rows, keys, chunk, previous, first):
    """Video-XL-2: chunks begin at the first visual token; a query sees its chunk, the previous ones and the prefix."""
    chunks = [range(start, min(start + chunk, keys)) for start in range(first, keys, chunk)]

    def sees(row, col):
        if col < first or row < first:
            return True
        own = next(c for c, tokens in enumerate(chunks) if row in tokens)
        return any(col in tokens for tokens in chunks[max(0, own - previous) : own + 1])

    rule = Rule.chunked(chunk, previous, first=first)
    check_mask(backend, inputs(random, rows, keys), rule, grid(rows, keys, sees))


@QUICK
@given(data=st.data())
def test_any_combination(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows, keys = data.draw(st.integers(1, 150)), data.draw(st.integers(0, 260))
    batch, key_heads = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2))
    heads = key_heads * data.draw(st.integers(1, 2))
    number = st.one_of(st.integers(1, 10), st.integers(60, 70), st.integers(1, 300), st.just(LONG))
    rule = [
        [data.draw(number) - 1, data.draw(number), data.draw(number), data.draw(number) - 1, data.draw(number)]
        for _ in range(data.draw(st.sampled_from([1, heads])))
    ]
    options = {}
    if data.draw(st.booleans()):
        bias = torch.randn(batch, keys, generator=random)
        options["key_bias"] = torch.where(bias < -1.0, -math.inf, bias)
    for name in ("starts_k", "seqlens_k"):
        if data.draw(st.booleans()):
            options[name] = torch.randint(0, keys + 1, (batch,), generator=random, dtype=torch.int32)
    check(backend, inputs(random, rows, keys, 8, batch, heads, key_heads), rule_of(*rule), **options)


@pytest.mark.parametrize("rule", [[5, 30, 1, 0, 0], [20, 2, 30, 3, 1]])
def test_several_blocks_of_queries(backend, random, rule):
    check(backend, inputs(random, 270, 300, 8, heads=1), rule_of(rule))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "depth"), [(1, 72), (5, 64), (6, 128), (70, 64), (20, 256)])
def test_dtypes_and_head_dimensions(backend, random, rows, depth, dtype):
    check(backend, inputs(random, rows, 150, depth, heads=1, dtype=dtype), rule_of([5, 70, 1, 2, 1]))


@pytest.mark.parametrize("rows", [1, 20])
def test_grouped_queries(backend, random, rows):
    tensors = inputs(random, rows, 150, heads=8, key_heads=2)
    check(backend, tensors, rule_of([3, 50, 1, 0, 0]))
    check(backend, tensors, rule_of(*[[3, 10 * h + 1, 1, 0, 0] for h in range(8)]))


@pytest.mark.parametrize("rows", [1, 30])
def test_padding_on_the_left_moves_the_rule(backend, random, rows):
    """Each batch item is what it is without its padding, whatever stands there."""
    tensors, starts = inputs(random, rows, 200, batch=2), torch.tensor([0, 90], dtype=torch.int32)
    rule = rule_of([5, 2, 30, 2, 0])
    for x in tensors[1:]:
        x[1, :, :90] = math.nan
    out, lse = run(backend, tensors, rule, starts_k=starts)
    for b, start in enumerate(starts.tolist()):
        alone = [tensors[0][b : b + 1], *(x[b : b + 1, :, start:] for x in tensors[1:])]
        expected = reference.rule_attention(*alone, rule)
        torch.testing.assert_close(out[b : b + 1].cpu().double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b : b + 1].cpu().double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 20])
def test_queries_without_a_key(backend, random, rows):
    tensors, rule = inputs(random, rows, 70), rule_of([3, 5, 1, 0, 0])
    for options in (
        {"key_bias": torch.full((1, 70), -math.inf)},
        {"seqlens_k": torch.zeros(1, dtype=torch.int32)},
        {"starts_k": torch.full((1,), 70, dtype=torch.int32)},
    ):
        out, lse = run(backend, tensors, rule, **options)
        assert (out == 0).all() and (lse == -math.inf).all()
    # More queries than keys: the first see nothing.
    out, lse = check(backend, inputs(random, rows, 1), rule)
    assert (lse[:, :, :-1] == -math.inf).all() and torch.isfinite(lse[:, :, -1]).all()


@pytest.mark.parametrize("rows", [1, 70])
def test_keys_that_no_query_sees_are_not_read(backend, random, rows):
    query, key, value = inputs(random, rows, 400)
    rule = rule_of([10, 30, 1, 4, 0])  # blocks 3, 7, ...
    unseen = [n for n in range(10, 400 - rows - 30) if n // 64 % 4 != 3]
    expected = run(backend, (query, key, value), rule)
    key[:, :, unseen], value[:, :, unseen] = math.nan, math.inf
    for got, want in zip(run(backend, (query, key, value), rule), expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("rows", [1, 140])
def test_equals_block_lists_on_equal_masks(backend, random, rows):
    """MoA's blocks are lists of blocks where the queries' blocks line up with the keys'."""
    keys = 64 * 6 if rows == 1 else rows
    tensors = inputs(random, rows, keys, 32)
    own = [block + (keys - rows) // 64 for block in range(-(-rows // 64))]
    listed = [sorted({0, *range(max(0, last - 1), last + 1)}) for last in own]
    counts = torch.tensor([[[len(blocks) for blocks in listed]]], dtype=torch.int32)
    indices = torch.tensor([[[blocks + [0] * (3 - len(blocks)) for blocks in listed]]], dtype=torch.int32)
    lists = BlockLists(counts, indices, block_q=64, block_k=64, causal=True)
    options = {"block_q": 64, "block_k": 64, "causal": True}
    expected = backend.ops.block_sparse_attention(*backend.put(*tensors, lists.counts, lists.indices), **options)
    for got, want in zip(run(backend, tensors, rule_of([64, 2, 64, 0, 0])), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 30])
def test_a_rule_that_sees_everything_is_causal_attention(backend, random, rows):
    tensors = inputs(random, rows, 150, 32)
    mask = torch.ones(rows, 150, dtype=torch.bool).tril(150 - rows)
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
    for rule in ([LONG, 1, 1, 0, 0], [0, LONG, LONG, 0, 0], [0, 1, LONG, 0, 0], [0, 1, 1, 1, 0], [3, 300, 1, 7, LONG]):
        out, _ = run(backend, tensors, rule_of(rule))
        torch.testing.assert_close(out.cpu(), dense, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 20])
def test_long_windows_are_cut_into_parts(backend, random, rows):
    keys = 1_100 if backend.name == "simt" else 9_000
    check(backend, inputs(random, rows, keys, 16, heads=2, key_heads=1), rule_of([64, keys - 200, 1, 2, 0]))


@pytest.mark.parametrize("rows", [1, 150])
def test_same_bits_for_any_thread_count(random, rows):
    tensors = (*inputs(random, rows, 5000, 32, heads=4), rule_of([64, 4000, 1, 3, 0]))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.vtk.rule_attention(*tensors))
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


def test_a_backward_pass_says_that_there_is_none(random):
    query, key, value = (x.requires_grad_() for x in inputs(random, 9, 70))
    out, lse = vtkernels.rule_attention(query, key, value, rule_of([3, 5, 1, 0, 0]))
    assert out.requires_grad and lse.requires_grad
    with pytest.raises(NotImplementedError, match="rule_attention: there is no backward pass yet"):
        out.sum().backward()


Q, K = torch.zeros(2, 4, 9, 8), torch.zeros(2, 2, 70, 8)
RULE = rule_of([4, 10, 1, 2, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(Q[0], K, K, RULE), r"query of shape \[B, H, Q, D\], got \[4, 9, 8\]"),
        (lambda op: op(Q, K.half(), K, RULE), r"key of dtype float32, got float16"),
        (lambda op: op(Q, K, K[:, :, :60], RULE), r"value.shape = key.shape = .* got \[2, 2, 60, 8\]"),
        (lambda op: op(Q, K, K, RULE.long()), r"rule of dtype int32, got int64"),
        (lambda op: op(Q, K, K, RULE[0]), r"rule of shape \[H \| 1, 5\] with H = 4, got \[5\]"),
        (lambda op: op(Q, K, K, RULE.expand(3, 5)), r"rule of shape \[H \| 1, 5\] with H = 4, got \[3, 5\]"),
        (lambda op: op(Q, K, K, RULE[:, :4]), r"rule of shape .* got \[1, 4\]"),
        (lambda op: op(Q, K, K, RULE.repeat(5, 1).T[:1]), r"rule with a contiguous last dimension"),
        (lambda op: op(Q, K, K, RULE, key_bias=torch.zeros(2, 9)), r"key_bias.shape = \[B, N\] = \[2, 70\]"),
        (lambda op: op(Q, K, K, RULE, starts_k=torch.ones(3).int()), r"starts_k.shape = \[B\] = \[2\], got \[3\]"),
        (lambda op: op(Q, K, K, RULE, seqlens_k=torch.ones(2)), r"seqlens_k of dtype int32, got float32"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::rule_attention.*" + message):
        call(backend.ops.rule_attention)


@pytest.mark.parametrize(
    ("rule", "options", "clamped", "message"),
    [
        ([-1, 3, 1, 0, 0], {}, [0, 3, 1, 0, 0], r"rule with sink >= 0, got rule\[0, 0\] = -1"),
        ([0, 0, 1, 0, 0], {}, [0, 1, 1, 0, 0], r"rule with window >= 1, got rule\[0, 1\] = 0"),
        ([0, 3, -(2**31), 0, 0], {}, [0, 3, 1, 0, 0], r"rule with unit >= 1, got rule\[0, 2\] = -2147483648"),
        ([0, 3, 1, -2, 0], {}, [0, 3, 1, 0, 0], r"rule with stride >= 0, got rule\[0, 3\] = -2"),
        ([0, 3, 1, 2, -1], {}, [0, 3, 1, 2, 0], r"rule with phase >= 0, got rule\[0, 4\] = -1"),
        (
            [4, 3, 1, 0, 0],
            {"starts_k": [0, -1]},
            {"starts_k": [0, 0]},
            r"0 <= starts_k <= N = 70, got starts_k\[1\] = -1",
        ),
        (
            [4, 3, 1, 0, 0],
            {"seqlens_k": [3, 71]},
            {"seqlens_k": [3, 70]},
            r"0 <= seqlens_k <= N = 70, got seqlens_k\[1\] = 71",
        ),
    ],
)
def test_values_out_of_range(backend, random, rule, options, clamped, message):
    """An error on the CPU, clamped by the CUDA kernels."""
    tensors = inputs(random, 20, 70, batch=2)
    options = {n: torch.tensor(v, dtype=torch.int32) for n, v in options.items()}
    if backend.checks_values:
        with pytest.raises(RuntimeError, match="vtk::rule_attention: expected " + message):
            run(backend, tensors, rule_of(rule), **options)
        return
    if isinstance(clamped, dict):
        clamped, fitting = rule, {n: torch.tensor(v, dtype=torch.int32) for n, v in clamped.items()}
    else:
        fitting = {}
    got, want = run(backend, tensors, rule_of(rule), **options), run(backend, tensors, rule_of(clamped), **fitting)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
