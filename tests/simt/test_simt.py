"""The instrument itself: what it computes, what it catches, and that the schedule changes no result."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.reference import prune_gather as reference
from tests.simt import emulator, sanitized
from vtkernels.testing.compare import assert_same_bits

pytestmark = [
    pytest.mark.simt,
    pytest.mark.skipif(not emulator.OPS.exists(), reason="libvtk_simt.so is not built (cmake -DVTK_SIMT=ON)"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=emulator.SEEDS, ids="seed{}".format)
def faults(request):
    with emulator.schedule(emulator.FAULTS, request.param, capability=90, spins=200_000) as library:
        yield library


# The vocabulary: results against the definitions of the CUDA programming guide.


@pytest.mark.parametrize("width", [32, 16, 8])
def test_warp_operations(faults, width):
    x = torch.randint(0, 100, (32,), dtype=torch.int32)
    out = torch.full((16, 32), -1, dtype=torch.int32)
    assert emulator.call(faults, "vocabulary_warp", x, out, width) == ""
    values, lanes = x.tolist(), range(32)

    def signed(word: int) -> int:
        return (word & 0xFFFFFFFF) - (1 << 32 if word & 0x80000000 else 0)

    def segment(lane: int) -> int:
        return lane // width * width

    def within(lane: int, other: int) -> int:
        return values[other] if segment(lane) <= other < segment(lane) + width else values[lane]

    def bits(chosen) -> int:
        return signed(sum(1 << lane for lane in lanes if chosen(lane)))

    def byte(a: int, b: int, selector: int) -> int:
        source = (b << 32 | a).to_bytes(8, "little")
        return signed(int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little"))

    xor = 0
    for v in values:
        xor ^= v
    expected = [
        [values[segment(lane) + (lane + 3) % width] for lane in lanes],
        [within(lane, lane - 3) for lane in lanes],
        [within(lane, lane + 3) for lane in lanes],
        [within(lane, lane ^ 5) for lane in lanes],
        [bits(lambda i: values[i] & 1)] * 32,
        [int(7 in values)] * 32,
        [1] * 32,
        [bits(lambda i, lane=lane: values[i] % 5 == values[lane] % 5) for lane in lanes],
        [sum(values)] * 32,
        [min(values) - 50] * 32,
        [signed(max((v - 50) & 0xFFFFFFFF for v in values))] * 32,
        [xor] * 32,
        [sum(values[:16])] * 16 + [max(values[16:])] * 16,
        [2 * values[lane ^ 1] for lane in lanes],
        [byte(0x33221100, 0x77665544, 0x7051 + lane % 4) for lane in lanes],
        [
            signed(int(f"{v:032b}"[::-1], 2)) + (32 - v.bit_length()) + (v & -v).bit_length() + v.bit_count()
            for v in values
        ],
    ]
    for row, (got, want) in enumerate(zip(out.tolist(), expected, strict=True)):
        assert got == want, f"row {row} of warp_kernel"


def test_block_operations(faults):
    out = torch.full((8,), -1, dtype=torch.int32)
    assert emulator.call(faults, "vocabulary_block", out) == ""
    assert out.tolist() == [sum(range(64)), 32, 1, 0, 64, -1, 9, 42]


def test_grid_barrier_needs_a_cooperative_launch(faults):
    counter, values, out = (torch.zeros(n, dtype=torch.int32) for n in (1, 6, 6))
    assert emulator.call(faults, "vocabulary_grid_barrier", counter, values, out, 6, 1) == ""
    assert out.tolist() == [21] * 6
    counter.zero_()
    assert "no progress" in emulator.call(faults, "vocabulary_grid_barrier", counter, values, out, 6, 0)
    assert "only 128 fit" in emulator.call(faults, "vocabulary_grid_barrier", counter, values, out, 1000, 1)


def test_cluster_shared_memory(faults):
    out = torch.full((8, 32), -1, dtype=torch.int32)
    assert emulator.call(faults, "vocabulary_cluster", out, 1) == ""
    for block in range(8):
        neighbour = block // 4 * 4 + (block + 1) % 4
        assert out[block].tolist() == [100 * neighbour + t + 7 for t in range(32)]
    assert re.search("race|before anybody wrote", emulator.call(faults, "vocabulary_cluster", out, 0))


# Planted faults: each is caught under every schedule, with the place in the message, and its repaired twin runs clean.

FAULTS = {
    "missing_syncthreads": r"(race|before anybody wrote it): .* of .*values .* missing_syncthreads\.cu:8",
    "missing_syncwarp": r"(race: .* without a barrier after|before anybody wrote it).* missing_syncwarp\.cu:(9|11)",
    "wrong_shuffle_mask": r"__shfl_xor_sync .*wrong_shuffle_mask\.cu:6\) (is called by lane|reads lane)",
    "unwritten_shared": r"before anybody wrote it: a read of .*values \+ 252, 4 bytes at unwritten_shared\.cu:10",
    "past_static_shared": r"out of bounds: a write of .*second \(256 bytes\) \+ 256, 4 bytes at past_static_shared",
    "past_dynamic_shared": r"out of bounds: a write of dynamic shared memory \+ 252, 4 bytes at past_dynamic_shared",
    "divergent_barrier": r"deadlock: 32 threads wait, .* \(divergent_barrier\.cu:7\); 32 never come, .* has exited",
    "divergent_warp": r"divergent warp: .*__shfl_sync .*divergent_warp\.cu:\d+.* while .*waits at __shfl_sync",
    "endless_spin": r"no progress",
    "missing_async_wait": r"before its asynchronous copy was waited for: a read of .*missing_async_wait\.cu:13",
    "missing_mbarrier_wait": r"thread .*: before its asynchronous copy was waited for: a read of .*wait\.cu:17",
    "wrong_mbarrier_phase": r"thread .*: before (its asynchronous copy was waited for|anybody wrote it): .*:18",
    "endless_mbarrier": r"deadlock: 32 threads wait, .* waits for parity 0 of mbarrier .*done \+ 0 \(endless_mbarrier"
    r"\.cu:12\), 1 of 2 arrivals and 0 bytes missing",
    "too_much_shared": r"invalid launch: 49153 bytes of dynamic shared memory",
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(faults, name):
    assert emulator.call(faults, name, 0) == ""
    message = emulator.call(faults, name, 1)
    assert re.search(FAULTS[name], message), message
    assert f"kernel {name}_kernel" in message


def test_every_fault_is_listed():
    planted = {path.stem for path in (ROOT / "tests/simt/faults").glob("*.cu")}
    assert planted == set(FAULTS) | {"past_global_row"}


# The ops: the same bits under every schedule and for every number of multiprocessors, which decides the grid.


@pytest.mark.parametrize("multiprocessors", [1, 4, 13])
@pytest.mark.parametrize("seed", emulator.SEEDS)
def test_prune_gather_under_any_schedule(random, seed, multiprocessors):
    torch.ops.load_library(str(emulator.OPS))
    scores = torch.randint(0, 40, (2, 3, 700), generator=random).float()
    tokens = torch.randn(2, 700, 9, generator=random)
    keep_mask, drop_mask = torch.zeros(2, 2, 700, dtype=torch.bool)
    keep_mask[:, 600:620], drop_mask[:, :100] = True, True
    with emulator.schedule(emulator.OPS, seed, multiprocessors):
        for order in ("position", "score"):
            options = {"keep_mask": keep_mask, "drop_mask": drop_mask, "head_reduce": "sum", "order": order}
            got = torch.ops.vtk_simt.prune_gather(tokens, scores, 150, **options)
            for x, y in zip(got, reference.prune_gather(tokens, scores, 150, **options), strict=True):
                assert_same_bits(x, y)


# ASan and UBSan; what they are for is in test_fuzz.py.


@sanitized.BUILT
def test_prune_gather_is_clean_under_asan():
    done = sanitized.run(
        "-c",
        """
import torch
import vtkernels
from tests.simt import emulator
torch.ops.load_library(str(emulator.OPS_ASAN))
tokens, scores = torch.randn(2, 300, 7), torch.randn(2, 300)
for seed in range(4):
    with emulator.schedule(emulator.OPS_ASAN, seed):
        for keep in (0, 1, 77, 300):
            for order in ("position", "score"):
                got = torch.ops.vtk_simt.prune_gather(tokens, scores, keep, order=order)
                want = torch.ops.vtk.prune_gather(tokens, scores, keep, order=order)
                assert all(torch.equal(a, b) for a, b in zip(got, want))
        bounds, keeps = torch.tensor([0, 5, 5, 300], dtype=torch.int32), torch.tensor([2, 0, 99], dtype=torch.int32)
        torch.ops.vtk_simt.prune_gather.varlen(tokens[0], scores[0], bounds, keeps, total_keep=120)
""",
    )
    assert done.returncode == 0, done.stderr[-4000:]


@sanitized.BUILT
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("past_global_row", r"heap-buffer-overflow[^#]*READ of size 4[^#]*#0 .*past_global_row\.cu:7"),
        ("past_static_shared", r"past_static_shared\.cu:8"),
        ("past_dynamic_shared", r"use-after-poison[^#]*WRITE of size 4[^#]*#0 .*past_dynamic_shared\.cu:7"),
    ],
)
def test_asan_catches(name, message):
    load = f"import ctypes; fault = ctypes.CDLL({str(emulator.FAULTS_ASAN)!r}).{name}"
    broken = sanitized.run("-c", load + "; fault(0); print('clean', flush=True); fault(1)")
    assert broken.stdout == "clean\n", broken.stderr[-4000:]
    assert broken.returncode != 0 and re.search(message, broken.stderr), broken.stderr[-4000:]
