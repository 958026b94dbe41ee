"""The children of a run that are not pytest: ``facts``, ``exercise`` (under a sanitizer) and ``measure``."""

from __future__ import annotations

import argparse
import importlib
import platform
import subprocess
import sys
from dataclasses import asdict, fields

import torch

from bench import harness
from bench.gpu.journal import Journal
from vtkernels import _library
from vtkernels.testing.cases import all_cases
from vtkernels.testing.timer import back_to_back_seconds

SLOW_PEERS = ("inductor", "loop")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _gpu_facts(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip(),
        "cuda": torch.version.cuda,
    }


def _l2_bandwidth(device: torch.device) -> float:
    """Bytes per second (read plus written) of a copy that stays in a quarter of the L2, again and again."""
    count = torch.cuda.get_device_properties(device).L2_cache_size // 8 // 4
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / back_to_back_seconds(lambda: target.copy_(source), 2000, device)


def _machine(device: torch.device) -> dict[str, object]:
    machine = harness.environment(device)
    del machine["commit"]  # the run knows it better: git may not be here
    machine |= {"python": platform.python_version(), "system": platform.platform(), "processor": harness.processor()}
    if device.type == "cuda":
        if _library.LIBRARIES.cuda is None:
            raise RuntimeError(f"libvtk_cuda.so is not loaded: {_library.LIBRARIES.cuda_reason}")
        machine |= _gpu_facts(device)
    return {"environment": machine}


def facts(options: argparse.Namespace, journal: Journal) -> None:
    """The machine, and what it reaches."""
    device = torch.device(options.device)
    questions = {
        "machine": _machine,
        "ceilings": lambda device: {"ceilings": asdict(harness.measure_ceilings(device, options.quick))},
    }
    if device.type == "cuda":
        questions["L2 bandwidth"] = lambda device: {"ceilings": {"l2_bandwidth": _l2_bandwidth(device)}}
    for item, question in questions.items():
        if item not in journal.done:
            with journal.item(item) as box:
                box["result"] = question(device)


def exercise(options: argparse.Namespace, journal: Journal) -> None:
    """The small cases of one op, in every dtype: what the sanitizers watch. The tests have checked the values."""
    namespace = torch.ops.vtk if options.device == "cuda" else torch.ops.vtk_simt
    if options.load:
        torch.ops.load_library(options.load)

    def put(value):
        return value.to(options.device) if isinstance(value, torch.Tensor) else value

    for overload, cases in all_cases().items():
        name, _, variant = overload.partition(".")
        if name != options.op:
            continue
        for case in cases:
            for dtype in DTYPES:
                with journal.item(f"{overload}: {case.name}, {str(dtype).removeprefix('torch.')}"):
                    arguments = case.make(torch.Generator().manual_seed(20260), dtype)
                    args, keywords = torch.utils._pytree.tree_map(put, arguments)
                    getattr(getattr(namespace, name), variant or "default")(*args, **keywords)
                    if options.device == "cuda":
                        torch.cuda.synchronize()


def measure(options: argparse.Namespace, journal: Journal) -> None:
    """The benchmarks of one family; the quick ones are the first of each op, once, without peers that take minutes."""
    device = torch.device(options.device)
    names = [field.name for field in fields(harness.Ceilings)]
    known = {name: journal.ceilings[name] for name in names if name in journal.ceilings}
    missing = len(known) < len(names)
    ceilings = harness.measure_ceilings(device, options.quick) if missing else harness.Ceilings(**known)
    waiting = set(importlib.import_module(f"bench.{options.family}").OPS)
    for case in harness.cases([options.family], device):
        if options.quick:
            if case.op not in waiting:
                continue
            case.peers = {name: peer for name, peer in case.peers.items() if not any(s in name for s in SLOW_PEERS)}
        waiting.discard(case.op)
        if (item := f"{case.op} {case.name}") not in journal.done:
            with journal.item(item) as box:
                box["result"] = asdict(harness.run_case(case, device, ceilings, 1 if options.quick else 15))
        if options.quick and not waiting:
            break


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (facts, exercise, measure):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        command.add_argument("--device", choices=["cpu", "cuda"], required=True)
        command.add_argument("--quick", action="store_true", help="Less of everything: a dry run's.")
        Journal.add_options(command)
    commands.choices["exercise"].add_argument("--op", required=True)
    commands.choices["exercise"].add_argument("--load", default="")
    commands.choices["measure"].add_argument("--family", required=True)
    options = parser.parse_args()
    options.function(options, Journal(options))


if __name__ == "__main__":
    sys.exit(main())
