"""Which jobs a run has: on a GPU, and dry."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass

from bench.checkout import ROOT
from bench.gpu.supervise import Job

LIB = ROOT / "python" / "vtkernels" / "lib"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NO_GPU = "not run: no GPU"
DRY_TESTS = 16  # a dry run takes every 16th test


@dataclass(frozen=True)
class Phase:
    """Jobs that may run side by side, ``width`` at a time."""

    name: str
    width: int
    jobs: list[Job]


def _child(*words: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu.child", *words]


def tests(backends: list[str], slices: int, width: int, every: int = 1, paths: tuple[str, ...] = ("tests",)) -> Phase:
    """``slices`` processes share every ``every``-th test."""
    command = [sys.executable, "-m", "bench.gpu.child_pytest", "--backends", *backends, "--every", str(slices * every)]
    jobs = [
        Job(
            f"tests {first + 1} of {slices}",
            "tests",
            [*command, "--first", str(first * every), "--paths", *paths],
            item_seconds=120,
            environment={"OMP_NUM_THREADS": "1"},
        )
        for first in range(slices)
    ]
    return Phase("tests", width, jobs)


def sanitizers(ops: list[str], width: int) -> Phase:
    """compute-sanitizer over the small cases of every op, a process for each tool and op."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    jobs = []
    for tool in TOOLS:
        command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
        jobs += [
            Job(
                f"{tool} {op}",
                "sanitizers",
                [*command, *_child("exercise", "--device", "cuda", "--op", op)],
                item_seconds=120,
                quiet_seconds=240,
                # Without torch's cache every tensor is an allocation of its own, with its own end.
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"},
                group=[tool, op],
                expected="SUMMARY: 0 ",
                unsupported="Device not supported",
                skip="" if program else "not run: compute-sanitizer is not on this machine",
            )
            for op in ops
        ]
    return Phase("sanitizers", width, jobs)


def emulated_sanitizers(ops: list[str], width: int) -> Phase:
    """The same calls under the emulation, which checks races and bounds itself; what a GPU would say is not run."""
    exercise = _child("exercise", "--device", "cpu", "--load", str(LIB / "libvtk_simt.so"))
    settings = {"OMP_NUM_THREADS": "1"}
    jobs = []
    for op in ops:
        command, group = [*exercise, "--op", op], ["emulation", op]
        jobs.append(Job(f"emulation {op}", "sanitizers", command, 120, environment=settings, group=group))
    jobs += [Job(f"{tool} {op}", "sanitizers", [], 0, group=[tool, op], skip=NO_GPU) for tool in TOOLS for op in ops]
    return Phase("sanitizers", width, jobs)


def benchmarks(families: list[str], device: str, *words: str) -> Phase:
    """One after the other: a measurement shares the machine with nothing. Compiling peers takes its time."""
    jobs = [
        Job(
            f"benchmarks {family}",
            "benchmarks",
            _child("measure", "--device", device, "--family", family, *words),
            item_seconds=240,
        )
        for family in families
    ]
    return Phase("benchmarks", 1, jobs)


def facts(device: str, *words: str) -> Phase:
    return Phase("facts", 1, [Job("facts", "facts", _child("facts", "--device", device, *words), item_seconds=120)])


def ops_and_families() -> tuple[list[str], list[str]]:
    from bench import harness  # imports torch and every family
    from vtkernels.testing.cases import all_cases

    return sorted({name.partition(".")[0] for name in all_cases()}), harness.families()


def gpu() -> list[Phase]:
    ops, families = ops_and_families()
    slices = max(1, min(12, (os.cpu_count() or 1) - 2))
    return [facts("cuda"), tests(["cuda"], slices, slices), sanitizers(ops, 8), benchmarks(families, "cuda")]


DRY_CUT = f"every {DRY_TESTS}th test; the first benchmark of each op, once, without torch.compile and torch loops"


def dry() -> list[Phase]:
    ops, families = ops_and_families()
    return [
        facts("cpu", "--quick"),
        tests(["cpu", "simt"], 2, 2, DRY_TESTS),
        emulated_sanitizers(ops, 2),
        benchmarks(families, "cpu", "--quick"),
    ]
