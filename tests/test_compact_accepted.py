from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference.compact_accepted import compact_accepted as reference
from vtkernels import compact_accepted
from vtkernels.testing.compare import assert_same_bits

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def paths(random, batch, tail):
    """Any ascending nodes behind the root, and for some requests nothing at all: [B, tail], [B]."""
    accepted, counts = torch.full((batch, tail), -1), []
    for row in accepted:
        nodes = [0] + [n for n in range(1, tail) if torch.rand((), generator=random) < 0.5]
        row[: len(nodes)] = torch.tensor(nodes)
        counts.append(len(nodes) - 1 if torch.rand((), generator=random) < 0.8 else -1)
    return accepted, ints(*counts)


def check(backend, caches, accepted, num_accepted, tail, slack=None):
    expected = reference(caches, accepted, num_accepted, tail=tail, slack=slack)
    moved = [x.to(backend.device) for x in caches]
    assert [x.stride() for x in moved] == [x.stride() for x in caches]
    options = {} if slack is None else {"slack": backend.put(slack)}
    backend.ops.compact_accepted(moved, backend.put(accepted), backend.put(num_accepted), tail=tail, **options)
    for ours, theirs in zip(moved, expected, strict=True):
        assert_same_bits(ours.cpu(), theirs)


@QUICK
@given(data=st.data())
def test_any_tree_and_layout(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, tail, before = (data.draw(st.integers(low, high)) for low, high in ((1, 4), (1, 13), (0, 9)))
    caches = []
    for _ in range(data.draw(st.integers(1, 4))):
        heads, width, layer_before = (data.draw(st.integers(1, high)) for high in (5, 40, 3))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
        full = torch.randint(0, 200, (batch, heads, layer_before + before + tail + 2, width), generator=random).to(
            dtype
        )
        form = data.draw(st.sampled_from(["plain", "cropped", "tokens first", "odd"]))
        if form == "plain":
            cache = full[:, :, :-2].contiguous()
        elif form == "cropped":
            cache = full[:, :, :-2]
        elif form == "tokens first":
            cache = full[:, :, :-2].transpose(1, 2).contiguous().transpose(1, 2)
        else:
            cache = full[:, :, 2:, 1:]
        caches.append(cache)
    accepted, counts = paths(random, batch, tail)
    slack = torch.randint(0, before + 1, (batch,), generator=random).int() if data.draw(st.booleans()) else None
    check(backend, caches, accepted, counts, tail, slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_layers(backend, random, dtype):
    caches = [torch.randn(2, 2, 30, 64, generator=random).to(dtype) for _ in range(256)]
    check(backend, caches, ints([0, 4, 9], [0, 1, 17], dtype=torch.int64), ints(2, 1), 20, ints(0, 7))


def test_a_chain_does_not_move(backend, random):
    cache = torch.randn(1, 2, 8, 16, generator=random)
    moved = cache.clone().to(backend.device)
    backend.ops.compact_accepted([moved], *backend.put(torch.arange(4).unsqueeze(0), ints(3)), tail=5)
    assert_same_bits(moved.cpu(), cache)


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 5, 0)])
def test_empty_caches(backend, shape):
    cache = torch.zeros(shape)
    rows = shape[0]
    check(backend, [cache], ints([0, 2], dtype=torch.int64).repeat(rows, 1), ints(1).repeat(rows), 3)


def test_what_cuda_clamps(backend, random):
    """Moves end at a node that does not ascend or is none of the tail; slack stays within the tokens."""
    if backend.checks_values:
        pytest.skip("the CPU reports them")
    cache, path = torch.randn(4, 1, 8, 4, generator=random), ints([0, 2], dtype=torch.int64).expand(4, -1)
    expected = reference([cache], path, ints(1, 0, 1, 1), tail=5, slack=ints(0, 0, 0, 3))[0]
    accepted = ints([0, 2, 2], [0, 5, 6], [0, 2, -1], [0, 2, 9], dtype=torch.int64)
    moved, counts, slack = backend.put(cache.clone(), ints(9, 2, 2, 2), ints(0, 0, -4, 70))
    backend.ops.compact_accepted([moved], backend.put(accepted), counts, tail=5, slack=slack)
    assert_same_bits(moved.cpu(), expected)


CACHE = torch.zeros(2, 1, 6, 4)
ROOT = {"accepted": torch.zeros(2, 1).long(), "num_accepted": ints(0, 0), "tail": 3}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"caches": []}, "expected 1 to 256 caches, got 0"),
        ({"caches": [CACHE[0]]}, r"expected caches\[0\] of shape \[B, Hk, N, D\]"),
        ({"caches": [CACHE, CACHE[:1]]}, r"expected caches\[1\] with the batch of caches\[0\] = 2"),
        ({"caches": [CACHE.transpose(2, 3)]}, r"caches\[0\] with a contiguous last dimension"),
        ({"caches": [torch.zeros(2, 1, 6, 4)[:, :1].expand(-1, 3, -1, -1)]}, r"caches\[0\] without expanded"),
        ({"tail": 7}, "with at least tail = 7 tokens"),
        ({"tail": -1}, "expected tail >= 0"),
        ({"accepted": torch.zeros(2, 1)}, "expected accepted of dtype int64"),
        ({"accepted": torch.zeros(3, 1).long()}, r"expected accepted.shape = \[B, slots\] = \[2, 1\]"),
        ({"num_accepted": torch.zeros(2).long()}, "expected num_accepted of dtype int32"),
        ({"slack": ints(0)}, r"expected slack.shape = \[B\] = \[2\]"),
    ],
)
def test_refuses(backend, change, message):
    call = {"caches": [CACHE.clone()], **ROOT, **change}
    with pytest.raises(RuntimeError, match=f"vtk::compact_accepted: .*{message}"):
        backend.ops.compact_accepted(**call)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_accepted": ints(0, 1)}, r"expected -1 <= num_accepted\[1\] < 1, got 1"),
        ({"num_accepted": ints(-2, 0)}, r"expected -1 <= num_accepted\[0\] < 1, got -2"),
        ({"accepted": ints([0], [3], dtype=torch.int64)}, r"accepted\[1\] to be ascending nodes below tail = 3, got 3"),
        ({"accepted": ints([0, 1], [1, 1], dtype=torch.int64), "num_accepted": ints(1, 1)}, "got 1 after 1"),
        ({"slack": ints(0, 4)}, r"expected 0 <= slack\[1\] <= 3, the tokens of caches\[0\]"),
        ({"slack": ints(-1, 0)}, r"expected 0 <= slack\[0\]"),
    ],
)
def test_refuses_values(change, message):
    with pytest.raises(RuntimeError, match=message):
        compact_accepted([CACHE.clone()], **{**ROOT, **change})


def test_refuses_gradients():
    with pytest.raises(RuntimeError, match="caches without gradients"):
        compact_accepted([CACHE.clone().requires_grad_()], **ROOT)
