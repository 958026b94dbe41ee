"""How every benchmark is run: check first, then time ours and the peers in interleaved rounds of one run.

A family module (bench/<family>.py) has ``OPS``, the overloads it measures, and ``cases(device)``, a generator of
``Case``; a case is built when it is its turn, so that big tensors do not pile up.
"""

from __future__ import annotations

import importlib
import pkgutil
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import vtkernels
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

    def ratio(self, peer: str) -> float | None:
        timing = self.peers[peer]
        return timing.median / self.ours.median if isinstance(timing, Timing) else None


def families() -> list[str]:
    folder = Path(__file__).parent
    modules = [m.name for m in pkgutil.iter_modules([str(folder)])]
    return [m for m in modules if hasattr(importlib.import_module(f"bench.{m}"), "OPS")]


def benchmarked_ops() -> set[str]:
    return {op for family in families() for op in importlib.import_module(f"bench.{family}").OPS}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second (read plus written) of a large copy into memory that is already mapped."""
    source = torch.randn(64 << 20, device=device)
    target = torch.empty_like(source).copy_(source)
    timing = compare_times({"copy": lambda: target.copy_(source)}, device, rounds=7)["copy"]
    return 2 * source.nbytes / (timing.median / 1e3)


def compiled(function: Callable[..., object], *args: object) -> Callable[[], Callable[[], object]]:
    """The inductor peer of ``function(*args)``."""

    def build():
        torch._dynamo.reset()
        fast = torch.compile(function, fullgraph=True, dynamic=False)
        fast(*args)
        return lambda: fast(*args)

    return build


def run_case(case: Case, device: torch.device, bandwidth: float, rounds: int) -> Result:
    expected = case.ours()
    calls: dict[str, Callable[[], object]] = {"ours": case.ours}
    missing: dict[str, str] = {}
    for name, build in case.peers.items():
        try:
            calls[name] = build()
            case.check(expected, calls[name]())
        except PeerMissing as reason:
            missing[name] = str(reason)
            calls.pop(name, None)
    del expected
    timings = compare_times(calls, device, rounds)
    seconds = timings["ours"].median / 1e3
    return Result(
        case.op,
        case.name,
        timings["ours"],
        {name: timings.get(name, missing.get(name, "not run")) for name in case.peers},
        case.bytes / seconds / 1e9,
        case.flops / seconds / 1e9,
        case.bytes / seconds / bandwidth,
        case.target,
    )


def run(families_to_run: list[str], device: torch.device, rounds: int, only: str = "") -> Iterator[Result | float]:
    """Yields the measured bandwidth, then one result a case."""
    bandwidth = copy_bandwidth(device)
    yield bandwidth
    for family in families_to_run:
        for case in importlib.import_module(f"bench.{family}").cases(device):
            if only in f"{case.op} {case.name}":
                yield run_case(case, device, bandwidth, rounds)


def environment(device: torch.device) -> dict[str, object]:
    folder = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "vtkernels": vtkernels.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": vtkernels._library.cpu_isa(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
