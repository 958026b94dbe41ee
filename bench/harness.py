"""How every benchmark is run: check first, then time ours and the peers in interleaved rounds of one run.

A family module (bench/<family>.py) has ``OPS``, the overloads it measures, and ``cases(device)``, a generator of
``Case``; a case is built when it is its turn, so that big tensors do not pile up.
"""

from __future__ import annotations

import importlib
import pkgutil
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import vtkernels
from bench.checkout import commit
from vtkernels.testing.timer import Timing, compare_times


class PeerMissing(Exception):
    """A peer that cannot run here; the text becomes its row in the table."""


@dataclass
class Case:
    """One shape of one op.

    ``peers`` maps a peer's name to a function that builds it: the built callable computes the same thing as ``ours``,
    and ``check(ours_output, peer_output)`` raises when it does not. Building may raise :class:`PeerMissing`.
    """

    op: str
    name: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], Callable[[], object]]]
    check: Callable[[object, object], None]
    bytes: int  # each input byte read once, each output byte written once
    flops: int = 0
    target: dict[str, float] = field(default_factory=dict)  # peer -> the ratio we hold ourselves to


@dataclass
class Result:
    op: str
    name: str
    ours: Timing
    peers: dict[str, Timing | str]
    gigabytes_per_second: float
    gigaflops: float
    bandwidth_fraction: float
    target: dict[str, float]
    floor: float  # milliseconds: no version runs faster
    floor_fraction: float  # floor over ours

    def ratio(self, peer: str) -> float | None:
        timing = self.peers[peer]
        return timing.median / self.ours.median if isinstance(timing, Timing) else None


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches, measured in the run: the figures behind every floor."""

    copy_bandwidth: float  # bytes per second, read plus written, of a large copy
    matmul_rate: float  # operations per second of a large matrix product of random numbers
    launch: float = 0.0  # seconds of the smallest kernel, timed as everything else is

    def floor(self, case: Case) -> float:
        """Seconds: the bytes, the operations or the launch."""
        return max(case.bytes / self.copy_bandwidth, case.flops / self.matmul_rate, self.launch)


def families() -> list[str]:
    folder = Path(__file__).parent
    found = pkgutil.iter_modules([str(folder)])
    modules = [m.name for m in found if not m.ispkg and m.name != "__main__"]  # whose packages a GPU machine lacks
    return [m for m in modules if hasattr(importlib.import_module(f"bench.{m}"), "OPS")]


def benchmarked_ops() -> set[str]:
    return {op for family in families() for op in importlib.import_module(f"bench.{family}").OPS}


def copy_bandwidth(device: torch.device, elements: int, rounds: int) -> float:
    """Bytes per second (read plus written) of a copy into memory that is already mapped."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source).copy_(source)
    timing = compare_times({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    return 2 * source.nbytes / (timing.median / 1e3)


def matmul_rate(device: torch.device, size: int, rounds: int) -> float:
    """Operations per second of a square matrix product of random numbers: bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = compare_times({"matmul": lambda: a @ b}, device, rounds)["matmul"]
    return 2 * size**3 / (timing.median / 1e3)


def launch_seconds(device: torch.device, rounds: int) -> float:
    """The smallest kernel that torch has, timed as every op is; a CPU has no such floor."""
    if device.type != "cuda":
        return 0.0
    value = torch.randn(1, device=device)
    return compare_times({"launch": value.neg_}, device, rounds)["launch"].median / 1e3


def measure_ceilings(device: torch.device, quick: bool = False) -> Ceilings:
    """``quick``: figures of the right kind, in a moment; the copy stays in the caches."""
    elements, size = (512 << 20, 8192) if device.type == "cuda" else (64 << 20, 1024)
    rounds = 7
    if quick:
        elements, size, rounds = 1 << 20, 256, 1
    return Ceilings(
        copy_bandwidth(device, elements, rounds), matmul_rate(device, size, rounds), launch_seconds(device, rounds)
    )


def compiled(function: Callable[..., object], *args: object) -> Callable[[], Callable[[], object]]:
    """The inductor peer of ``function(*args)``."""

    def build():
        torch._dynamo.reset()
        fast = torch.compile(function, fullgraph=True, dynamic=False)
        fast(*args)
        return lambda: fast(*args)

    return build


def _build(build: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """The peer, called once. A peer that does not work on this machine is a row that says so, not the run's end."""
    try:
        call = build()
        call()
    except PeerMissing:
        raise
    except Exception as error:
        raise PeerMissing(f"failed: {type(error).__name__}: {str(error).strip()[:200]}") from error
    return call


def _poison(call: Callable[[], object], device: torch.device) -> None:
    """Leaves NaN in freed blocks of the outputs' sizes: an element that the next call does not write shows."""
    sizes = [t.nbytes for t in torch.utils._pytree.tree_leaves(call()) if isinstance(t, torch.Tensor)]
    for block in [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]:
        block.fill_(0xFF)


def run_case(case: Case, device: torch.device, ceilings: Ceilings, rounds: int) -> Result:
    _poison(case.ours, device)
    expected = case.ours()
    calls: dict[str, Callable[[], object]] = {"ours": case.ours}
    missing: dict[str, str] = {}
    for name, build in case.peers.items():
        try:
            calls[name] = _build(build)
        except PeerMissing as reason:
            missing[name] = str(reason)
        else:
            case.check(expected, calls[name]())
    del expected
    timings = compare_times(calls, device, rounds)
    seconds, floor = timings["ours"].median / 1e3, ceilings.floor(case)
    return Result(
        case.op,
        case.name,
        timings["ours"],
        {name: timings.get(name, missing.get(name, "not run")) for name in case.peers},
        case.bytes / seconds / 1e9,
        case.flops / seconds / 1e9,
        case.bytes / seconds / ceilings.copy_bandwidth,
        case.target,
        floor * 1e3,
        floor / seconds,
    )


def cases(families_to_run: list[str], device: torch.device) -> Iterator[Case]:
    for family in families_to_run:
        yield from importlib.import_module(f"bench.{family}").cases(device)


def run(
    families_to_run: list[str], device: torch.device, ceilings: Ceilings, rounds: int, only: str = ""
) -> Iterator[Result]:
    for case in cases(families_to_run, device):
        if only in f"{case.op} {case.name}":
            yield run_case(case, device, ceilings, rounds)


def environment(device: torch.device) -> dict[str, object]:
    return {
        "commit": commit(),
        "vtkernels": vtkernels.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": vtkernels._library.cpu_isa(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
