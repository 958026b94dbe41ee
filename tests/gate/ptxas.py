"""What ptxas says of every kernel in libvtk_cuda.so, and the rules that a kernel must keep.

The source is the section .vtk.ptxas, which cmake/keep_ptxas.py puts into each object as it is compiled. The kernels are
counted once more from the host stubs in the symbol table, so a missing report does not pass for a clean one.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .kernels import Allowed

SECTION = ".vtk.ptxas"
ARCHITECTURES = ("sm_80", "sm_90a")
MAX_SECONDS = 90  # CPU time of one .cu, all architectures together; a busy machine takes half more than a quiet one
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FUNCTION = re.compile(r"Function properties for (\S+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
STUB = re.compile(r" _Z(?:GV)?Z?L?(\d+)(__device_stub__Z\w+)")


@dataclass(frozen=True)
class Usage:
    """One function on one architecture. A device function that ptxas did not inline has no registers of its own."""

    source: str
    symbol: str
    architecture: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int | None = None
    shared: int = 0


@dataclass(frozen=True)
class Report:
    usages: list[Usage]
    seconds: dict[str, float]  # source -> CPU time of its compilation
    nvcc: str
    kernels: frozenset[str]  # symbols of the kernels that the library can launch


def run(*command: str | Path, text: str | None = None) -> str:
    return subprocess.run(list(map(str, command)), input=text, capture_output=True, text=True, check=True).stdout


def parse(source: str, log: str) -> Iterable[Usage]:
    """The usages in the output of ptxas -v."""
    # One entry function a piece; what was compiled with it but not inlined into it follows in the same piece.
    for piece in re.split(r"(?=ptxas info\s+: Compiling entry function)", log):
        if not (entry := ENTRY.search(piece)):
            continue
        used = re.search(r"Used (\d+) registers(.*)", piece)
        for name, figures in zip(FUNCTION.findall(piece), FRAME.findall(piece), strict=True):
            usage = Usage(source, name, entry[2], *map(int, figures))
            if name == entry[1]:
                shared = re.search(r"(\d+) bytes smem", used[2])
                usage = replace(usage, registers=int(used[1]), shared=int(shared[1]) if shared else 0)
            yield usage


def stubs(library: Path) -> frozenset[str]:
    """The kernels that host code can launch: each has a stub named after its symbol."""
    found = STUB.findall(run("nm", library))
    return frozenset(name[: int(length)].removeprefix("__device_stub_") for length, name in found)


def read(library: Path) -> Report:
    """The report inside a library (or one object); without a section it holds no usages."""
    with tempfile.TemporaryDirectory() as folder:
        section, copy = Path(folder, "section"), Path(folder, "copy")
        command = ["objcopy", f"--dump-section={SECTION}={section}", str(library), str(copy)]
        subprocess.run(command, capture_output=True, check=False)
        lines = section.read_text().splitlines() if section.exists() else []
    records = [json.loads(line) for line in lines]
    return Report(
        usages=[usage for r in records for usage in parse(r["source"], r["ptxas"])],
        seconds={r["source"]: r["seconds"] for r in records},
        nvcc=", ".join(sorted({r["nvcc"] for r in records})),
        kernels=stubs(library),
    )


def demangle(symbols: Iterable[str]) -> dict[str, str]:
    """Symbol -> what a reader calls it: no return type, namespaces or parameters, template arguments kept."""
    symbols = list(symbols)
    names = run("c++filt", text="\n".join(symbols)).splitlines()
    return dict(zip(symbols, map(short, names), strict=True))


def short(name: str) -> str:
    """ "void vtk::(anonymous namespace)::scores_kernel<float>(Params)" -> "scores_kernel<float>"."""
    name = name.replace("(anonymous namespace)::", "")
    depth, start = 0, 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if depth == 0 and letter == "(":
            return name[start:i]
        if depth == 0 and letter in " :":
            start = i + 1
    return name[start:]


def base(instance: str) -> str:
    return instance.partition("<")[0]


def problems(report: Report, classes: Mapping[str, Mapping[str, Allowed]]) -> list[str]:
    """What is wrong, one line each; empty when the gate is open."""
    names = demangle({u.symbol for u in report.usages} | report.kernels)
    found = []
    for architecture in ARCHITECTURES:
        reported = {u.symbol for u in report.usages if u.architecture == architecture}
        found += [f"{names[k]}: no ptxas report for {architecture}" for k in report.kernels - reported]
    found += [] if report.kernels else ["no kernel found: not a CUDA library, or stripped"]
    for usage in report.usages:
        name, where = names[usage.symbol], f"on {usage.architecture} ({usage.source})"
        allowed = classes.get(usage.source, {}).get(base(name))
        if allowed is None:
            found.append(f"{name} {where}: not classed in tests/gate/kernels.py; hot kernels are HOT")
            continue
        figures = {"stack frame": usage.stack, "spill stores": usage.spill_stores, "spill loads": usage.spill_loads}
        for what, figure in figures.items():
            limit = allowed.stack if what == "stack frame" else allowed.spill
            if figure > limit:
                found.append(f"{name} {where}: {figure} bytes {what}, at most {limit} allowed")
    known = {(u.source, base(names[u.symbol])) for u in report.usages}
    gone = {(source, name) for source in classes for name in classes[source]} - known
    found += [f"{name} ({source}): classed in tests/gate/kernels.py but not in the library" for source, name in gone]
    for source, seconds in report.seconds.items():
        if seconds > MAX_SECONDS:
            found.append(f"{source}: {seconds:.0f} s to compile, at most {MAX_SECONDS}; split it or drop instances")
    return sorted(found)


HEADER = ("kernel", "architecture", "instances", "registers", "shared", "stack", "spill stores", "loads")


def rows(report: Report, every_instance: bool = False) -> list[tuple[str, ...]]:
    """The table: the largest figure of a kernel's instances, or one row an instance."""
    names = demangle({u.symbol for u in report.usages})
    groups: dict[tuple[str, str, str], list[Usage]] = defaultdict(list)
    for usage in report.usages:
        name = names[usage.symbol]
        groups[usage.source, name if every_instance else base(name), usage.architecture].append(usage)
    figures = ("registers", "shared", "stack", "spill_stores", "spill_loads")
    return [
        (name, architecture, str(len(group)), *(str(max(getattr(u, f) or 0 for u in group)) for f in figures))
        for (_, name, architecture), group in sorted(groups.items())
    ]
