from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.reference import prune_gather as reference
from vtkernels.testing.compare import assert_same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# One below, at and above the block, share and key-cache sizes of the kernels, and primes.
LENGTHS = [1, 2, 3, 7, 8, 9, 31, 32, 33, 257, 511, 512, 513, 576, 1023, 1025, 2304]
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(backend, tokens, scores, keep, **options):
    on_device = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    kept, indices = backend.ops.prune_gather(backend.put(tokens), backend.put(scores), keep, **on_device)
    expected_kept, expected = reference.prune_gather(tokens, scores, keep, **options)
    assert indices.cpu().tolist() == expected.tolist()
    assert_same_bits(kept.cpu(), expected_kept)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_and_budgets(backend, random, length, dtype):
    tokens = torch.randn(2, length, 5, generator=random).to(dtype)
    scores = torch.randn(2, length, generator=random).to(dtype)
    for keep in sorted({0, 1, length // 2, length - 1, length}):
        for order in ("position", "score"):
            check(backend, tokens, scores, keep, order=order)


@QUICK
@given(data=st.data())
def test_any_shape(backend, data):
    seed = data.draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    batch, length, width = (data.draw(st.integers(low, high)) for low, high in ((0, 4), (1, 70), (0, 40)))
    keep = data.draw(st.integers(0, length))
    # Few distinct values: ties everywhere.
    scores = torch.randint(0, data.draw(st.integers(1, 6)), (batch, length), generator=random).float()
    options = {"order": data.draw(st.sampled_from(["position", "score"]))}
    if data.draw(st.booleans()):
        state = torch.randint(0, 3, (batch, length), generator=random)  # 0 free, 1 forced, 2 dropped
        for b in range(batch):  # make it satisfiable
            state[b][(state[b] == 1).nonzero()[keep:, 0]] = 0
            state[b][(state[b] == 2).nonzero()[length - keep :, 0]] = 0
        options |= {"keep_mask": state == 1, "drop_mask": state == 2}
    check(backend, torch.randn(batch, length, width, generator=random), scores, keep, **options)


@pytest.mark.parametrize("order", ["position", "score"])
def test_special_values(backend, order):
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, math.nan, 1.0, 1.0]
    scores = torch.tensor([special, special[::-1]])
    tokens = torch.arange(24.0).reshape(2, 12, 1)
    for keep in range(13):
        check(backend, tokens, scores, keep, order=order)


@pytest.mark.parametrize("values", ["equal", "sorted", "reversed", "huge"])
def test_patterns(backend, random, values):
    ramp = torch.arange(700.0)
    row = {"equal": ramp * 0, "sorted": ramp, "reversed": -ramp, "huge": torch.randn(700, generator=random) * 1e30}[
        values
    ]
    check(backend, torch.randn(1, 700, 8, generator=random), row[None], 123)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_heads(backend, random, dtype, reduce):
    scores = torch.randn(3, 5, 90, generator=random).to(dtype)
    scores[1, 2, 7] = math.nan
    check(backend, torch.randn(3, 90, 4, generator=random), scores, 17, head_reduce=reduce)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views(backend, random, dtype):
    wide = torch.randn(4, 40, 24, generator=random).to(dtype)
    tokens = wide.transpose(0, 1)[1:39:2, :, 4:20].transpose(0, 1)  # batch and token strides, an offset, odd alignment
    scores = torch.randn(19, 4, generator=random).t()
    check(backend, tokens, scores, 6)
    check(backend, tokens[:1].expand(4, -1, -1), scores[:1].expand(4, -1), 6)


def test_row_sizes(backend, random):
    for width in (1, 2, 3, 4, 6, 8, 16, 17, 64, 100):
        for dtype in FLOATS:
            check(
                backend, torch.randn(2, 21, width, generator=random).to(dtype), torch.randn(2, 21, generator=random), 9
            )


def test_long_segment(backend, random):
    # Beyond 2^16 tokens and beyond the keys that fit into shared memory.
    scores = torch.randn(1, 70001, generator=random)
    tokens = torch.arange(70001.0)[None, :, None]
    _, indices = backend.ops.prune_gather(backend.put(tokens), backend.put(scores), 2000)
    assert indices[0].cpu().tolist() == scores[0].topk(2000).indices.sort().values.tolist()


@pytest.mark.parametrize("order", ["position", "score"])
def test_varlen(backend, random, order):
    lengths, budgets = [5, 0, 600, 1, 33, 0], [2, 0, 77, 1, 33, 0]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    keep = torch.tensor(budgets, dtype=torch.int32)
    tokens, scores = torch.randn(639, 10, generator=random), torch.randn(3, 639, generator=random)
    drop = torch.zeros(639, dtype=torch.bool)
    drop[[0, 10, 11]] = True
    for options in ({}, {"drop_mask": drop}, {"keep_mask": drop}):
        expected = reference.prune_gather_varlen(tokens, scores, bounds, keep, order=order, **options)
        for total in (None, 113):
            moved = {n: backend.put(v) for n, v in options.items()}
            out = backend.ops.prune_gather.varlen(
                *backend.put(tokens, scores, bounds, keep), order=order, total_keep=total, **moved
            )
            for got, want in zip(out, expected, strict=True):
                assert_same_bits(got.cpu(), want)


def test_varlen_without_segments(backend):
    empty = torch.zeros(0, dtype=torch.int32)
    bounds = torch.zeros(1, dtype=torch.int32)
    kept, indices, cu_kept = backend.ops.prune_gather.varlen(
        *backend.put(torch.zeros(0, 4), torch.zeros(0), bounds, empty)
    )
    assert kept.shape == (0, 4) and indices.shape == (0,) and cu_kept.tolist() == [0]


def test_tensors(backend, random):
    tensors = [
        torch.randn(2, 50, 12, generator=random),
        torch.randn(1, 50, 6, generator=random).half(),
        torch.arange(300).reshape(3, 2, 50),
        torch.randn(2, 50, 2, 3, generator=random),
        torch.arange(100, dtype=torch.uint8).reshape(2, 50),
    ]
    scores, dims = torch.randn(2, 50, generator=random), [1, 1, 2, 1, 1]
    kept, indices = backend.ops.prune_gather.tensors(
        [backend.put(t) for t in tensors], backend.put(scores), 11, token_dims=dims
    )
    expected, expected_indices = reference.prune_gather_tensors(tensors, scores, 11, dims)
    assert indices.cpu().tolist() == expected_indices.tolist()
    for got, want in zip(kept, expected, strict=True):
        assert_same_bits(got.cpu(), want.contiguous())


def test_as_many_tensors_as_a_launch_takes(backend, random):
    tensors = [torch.randn(2, 9, width, generator=random) for width in range(1, 17)]
    scores = torch.randn(2, 9, generator=random)
    kept, indices = backend.ops.prune_gather.tensors([backend.put(t) for t in tensors], backend.put(scores), 4)
    expected, expected_indices = reference.prune_gather_tensors(tensors, scores, 4, [1] * 16)
    assert indices.cpu().tolist() == expected_indices.tolist()
    for got, want in zip(kept, expected, strict=True):
        assert_same_bits(got.cpu(), want)


def test_attention_equals_scores_then_gather(backend, random):
    tokens, query, key = (torch.randn(*s, generator=random) for s in ((2, 40, 8), (2, 4, 3, 16), (2, 2, 40, 16)))
    tokens, query, key = backend.put(tokens, query, key)
    kept, indices, scores = backend.ops.prune_gather.attention(tokens, query, key, 9, query_reduce="max")
    assert_same_bits(scores, backend.ops.attention_scores(query, key, query_reduce="max"))
    again = backend.ops.prune_gather(tokens, scores, 9)
    assert_same_bits(kept, again[0])
    assert_same_bits(indices, again[1])


def test_empty_batch(backend):
    kept, indices = backend.ops.prune_gather(*backend.put(torch.zeros(0, 7, 3), torch.zeros(0, 7)), 2)
    assert kept.shape == (0, 2, 3) and indices.shape == (0, 2)
    kept, indices = backend.ops.prune_gather(*backend.put(torch.zeros(2, 0, 3), torch.zeros(2, 0)), 0)
    assert kept.shape == (2, 0, 3) and indices.shape == (2, 0)


def test_same_bits_for_any_thread_count(random):
    tokens, scores = (
        torch.randn(5, 3000, 16, generator=random),
        torch.randint(0, 50, (5, 3000), generator=random).float(),
    )
    outs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        outs.append(torch.ops.vtk.prune_gather(tokens, scores, 700))
    for out in outs[1:]:
        assert_same_bits(out[0], outs[0][0])
        assert_same_bits(out[1], outs[0][1])


# Two rows of 2^30 tokens without memory of their own: two threads, each asking for more scratch than is left.
OUT_OF_MEMORY = """
import resource, torch, vtkernels
torch.set_num_threads(2)
vtkernels.prune_gather(torch.zeros(2, 9000, 1), torch.zeros(2, 9000), 1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
try:
    vtkernels.prune_gather(torch.zeros(1, 1, 1).expand(2, 1 << 30, 1), torch.zeros(1, 1).expand(2, 1 << 30), 1)
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_out_of_memory_in_a_thread_is_an_exception():
    run = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "MemoryError\n"), run.stderr


@pytest.mark.parametrize("width", [96, 4096])  # memory from malloc, and blocks that are kept and handed out again
def test_reused_output_memory_is_never_shared(random, width):
    tokens = torch.randn(2, 1400, width, generator=random)
    alive = []
    for seed in range(4):
        scores = torch.randn(2, 1400, generator=random.manual_seed(seed))
        kept, indices = torch.ops.vtk.prune_gather(tokens, scores, 1200)
        alive = [*alive[-1:], (kept, indices)]  # frees the one before the last
        for rows, index in alive:
            assert torch.equal(rows, tokens.gather(1, index[..., None].expand_as(rows)))
    assert alive[0][0].data_ptr() != alive[1][0].data_ptr()


# Gradients.


def test_gradient_scatters_to_the_kept_rows(backend, random):
    tokens = backend.put(torch.randn(2, 9, 4, generator=random)).requires_grad_()
    scores = backend.put(torch.randn(2, 9, generator=random))
    kept, indices = torch.ops.vtk.prune_gather(tokens, scores, 4)
    weight = backend.put(torch.randn(2, 4, 4, generator=random))
    (kept * weight).sum().backward()
    expected = torch.zeros_like(tokens).scatter_add(1, indices[..., None].expand(-1, -1, 4), weight)
    assert_close(tokens.grad, expected, rtol=0, atol=0)


def test_gradient_of_every_overload(random):
    scores = torch.randn(2, 10, generator=random)
    states, table = torch.randn(2, 10, 4, generator=random), torch.randn(1, 10, 3, generator=random)
    states.requires_grad_(), table.requires_grad_()
    kept, indices = torch.ops.vtk.prune_gather.tensors([states, table, torch.arange(20).reshape(2, 10)], scores, 3)
    (kept[0].sum() + 2 * kept[1].sum()).backward()
    picked = torch.zeros(2, 10).scatter(1, indices, 1.0)
    assert_close(states.grad, picked[..., None].expand(-1, -1, 4).contiguous())
    assert_close(table.grad, 2 * picked.sum(0)[None, :, None].expand(1, 10, 3).contiguous())

    packed = torch.randn(10, 4, generator=random).requires_grad_()
    bounds, keep = torch.tensor([0, 4, 10], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    kept, indices, _ = torch.ops.vtk.prune_gather.varlen(packed, scores[0], bounds, keep)
    kept.sum().backward()
    assert packed.grad.sum(1).nonzero()[:, 0].tolist() == indices.tolist()


def test_compiles_whole(random):
    def prune(tokens, scores):
        kept, indices = torch.ops.vtk.prune_gather(tokens * 2, scores.softmax(-1), 4)
        return kept + 1, indices

    tokens, scores = torch.randn(2, 12, 6, generator=random).requires_grad_(), torch.randn(2, 12, generator=random)
    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
    kept, indices = compiled(tokens, scores)
    assert indices.tolist() == prune(tokens, scores)[1].tolist()
    kept.sum().backward()
    assert int((tokens.grad != 0).sum()) == 2 * 4 * 6


# Bad input: one clear error that names the op and the argument.

TOKENS, SCORES = torch.zeros(2, 6, 4), torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("message", "args", "options"),
    [
        ("0 <= keep <= N = 6, got keep = 7", (TOKENS, SCORES, 7), {}),
        ("0 <= keep <= N = 6, got keep = -1", (TOKENS, SCORES, -1), {}),
        (r"scores.shape = \[B, N\] = \[2, 6\]", (TOKENS, SCORES[:, :5], 2), {}),
        (r"scores.shape = \[B, N\] = \[2, 6\]", (TOKENS, SCORES[:1], 2), {}),
        (r"scores of shape \[B, N\] or \[B, H, N\]", (TOKENS, SCORES[0], 2), {}),
        (r"tokens of shape \[B, N, D\]", (TOKENS[0], SCORES, 2), {}),
        ("scores of dtype float32, float16 or bfloat16, got int64", (TOKENS, SCORES.long(), 2), {}),
        ("tokens of dtype float32, float16 or bfloat16, got float64", (TOKENS.double(), SCORES, 2), {}),
        ("tokens with a contiguous last dimension", (torch.zeros(2, 4, 6).transpose(1, 2), SCORES, 2), {}),
        ("head_reduce to be", (TOKENS, SCORES, 2), {"head_reduce": "median"}),
        ("head_reduce to be", (TOKENS, SCORES, 2), {"head_reduce": "none"}),
        ("order to be", (TOKENS, SCORES, 2), {"order": "random"}),
        ("keep_mask of dtype bool", (TOKENS, SCORES, 2), {"keep_mask": SCORES}),
        (r"drop_mask.shape = \[B, N\] = \[2, 6\]", (TOKENS, SCORES, 2), {"drop_mask": SCORES[:1].bool()}),
    ],
)
def test_bad_arguments(backend, message, args, options):
    args = [backend.put(a) if isinstance(a, torch.Tensor) else a for a in args]
    options = {n: backend.put(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    with pytest.raises(RuntimeError, match=f"vtk::prune_gather: .*{message}"):
        backend.ops.prune_gather(*args, **options)


FIRST = torch.tensor([[True] + [False] * 5] * 2)


@pytest.mark.parametrize(
    ("message", "keep", "options", "clamped"),
    [
        ("set in both keep_mask and drop_mask", 2, {"keep_mask": FIRST, "drop_mask": FIRST}, [1, 2]),
        ("keep_mask forces 6 tokens of batch row 0 but keep = 2", 2, {"keep_mask": ~SCORES.bool()}, [0, 1]),
        ("drop_mask leaves 1 tokens of batch row 0 but keep = 2", 2, {"drop_mask": ~FIRST}, [0, 1]),
    ],
)
def test_contradictory_masks(backend, message, keep, options, clamped):
    moved = {n: backend.put(v) for n, v in options.items()}
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=f"vtk::prune_gather: .*{message}"):
            backend.ops.prune_gather(TOKENS, SCORES, keep, **moved)
    else:
        assert backend.ops.prune_gather(*backend.put(TOKENS, SCORES), keep, **moved)[1][0].tolist() == clamped


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("message", "bounds", "keep", "options"),
    [
        ("cu_seqlens to run from 0 to T = 6, got 0 to 5", int32(0, 3, 5), int32(1, 1), {}),
        ("cu_seqlens to run from 0 to T = 6, got 1 to 6", int32(1, 3, 6), int32(1, 1), {}),
        ("ascending cu_seqlens, got 9 then 6", int32(0, 9, 6), int32(1, 1), {}),
        (r"0 <= keep\[1\] <= the segment's 3 tokens, got 4", int32(0, 3, 6), int32(1, 4), {}),
        (r"0 <= keep\[0\] <= the segment's 3 tokens, got -1", int32(0, 3, 6), int32(-1, 1), {}),
        (r"total_keep = sum\(keep\) = 2, got 3", int32(0, 3, 6), int32(1, 1), {"total_keep": 3}),
        ("keep of dtype int32, got int64", int32(0, 3, 6), int32(1, 1).long(), {}),
        (r"cu_seqlens.shape = \[segments \+ 1\] = \[3\]", int32(0, 6), int32(1, 1), {}),
    ],
)
def test_bad_segments(message, bounds, keep, options):
    with pytest.raises(RuntimeError, match=f"vtk::prune_gather: .*{message}"):
        torch.ops.vtk.prune_gather.varlen(torch.zeros(6, 4), torch.zeros(6), bounds, keep, **options)


def test_varlen_clamps_without_a_sync(backend):
    if backend.checks_values:
        pytest.skip("the CPU reports these, see test_bad_segments")
    tokens, scores = backend.put(torch.arange(6.0)[:, None], torch.arange(6.0))
    kept, indices, cu_kept = backend.ops.prune_gather.varlen(
        tokens, scores, *backend.put(int32(0, 3, 99), int32(9, -4)), total_keep=5
    )
    assert indices.cpu().tolist() == [0, 1, 2, -1, -1] and cu_kept.cpu().tolist() == [0, 3, 3]
    assert kept[:, 0].cpu().tolist() == [0, 1, 2, 0, 0]


@pytest.mark.parametrize(
    ("message", "tensors", "dims"),
    [
        ("1 to 16 tensors, got 0", [], None),
        ("one token_dims entry for each of the 1 tensors, got 2", [TOKENS], [1, 1]),
        (r"tensors\[0\] with batch dimension 2", [torch.zeros(3, 6, 4)], None),
        (r"token dimension between 1 and 2 for tensors\[0\]", [TOKENS], [3]),
        (r"tensors\[0\] with a contiguous last dimension", [torch.zeros(2, 6, 3, 4).transpose(2, 3)], None),
    ],
)
def test_bad_tensors(message, tensors, dims):
    with pytest.raises(RuntimeError, match=f"vtk::prune_gather: .*{message}"):
        torch.ops.vtk.prune_gather.tensors(tensors, SCORES, 2, token_dims=dims)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_mixed_devices():
    with pytest.raises(RuntimeError, match="expected scores on the device of tokens"):
        torch.ops.vtk.prune_gather(TOKENS.cuda(), SCORES, 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_graph_capture_and_stream(random):
    tokens, scores = torch.randn(2, 600, 64, generator=random).cuda(), torch.randn(2, 600, generator=random).cuda()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        torch.ops.vtk.prune_gather(tokens, scores, 50)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        kept, indices = torch.ops.vtk.prune_gather(tokens, scores, 50)
    scores.copy_(torch.randn(2, 600, generator=random))
    graph.replay()
    expected = torch.ops.vtk.prune_gather(tokens, scores, 50)
    assert_same_bits(kept, expected[0])
    assert_same_bits(indices, expected[1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_beyond_two_to_the_31_elements(random):
    tokens = torch.zeros(1, 2**16 + 8, 2**15 + 1, dtype=torch.bfloat16, device="cuda")
    tokens[0, -1] = 7
    scores = torch.arange(2.0**16 + 8, device="cuda")[None]
    kept, indices = torch.ops.vtk.prune_gather(tokens, scores, 3)
    assert indices[0].tolist() == [2**16 + 5, 2**16 + 6, 2**16 + 7] and (kept[0, 2] == 7).all()
