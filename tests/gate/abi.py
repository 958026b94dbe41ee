"""What an op library asks of its machine: the stable ABI of torch, the C and C++ runtime, nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from .ptxas import run

AUDIT = Path(sys.executable).with_name("torch-abi-audit")  # not there on Python 3.10
# The runtime's symbols carry a version; torch's stable ones are C functions with these prefixes, and torch-abi-audit
# knows since when each exists. What is left over is neither.
RUNTIME = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
STABLE_TORCH = re.compile(r"(aoti_)?torch_\w+$")
# NOTE: weak, or the library does not load on a torch without CUDA; null there, and nobody calls it.
CURRENT_STREAM = "aoti_torch_get_current_cuda_stream"
WEAK = {CURRENT_STREAM, "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
# The CUDA runtime is linked statically: the library needs a driver, and no toolkit of a certain version.
LIBRARIES = re.compile(r"libtorch(_cpu)?\.so|(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)|ld-linux[\w-]*)\.so\.\d+")


def symbol_problems(library: Path) -> list[str]:
    found = []
    for line in run("nm", "-D", "--undefined-only", library).splitlines():
        kind, symbol = line.split()
        if kind == "w" and symbol in WEAK:
            continue
        if symbol == CURRENT_STREAM:
            found.append(f"{symbol} must be weak")
        elif not (RUNTIME.search(symbol) or STABLE_TORCH.match(symbol)):
            found.append(f"undefined symbol outside the stable ABI: {run('c++filt', symbol).strip()}")
    return found


def linkage_problems(library: Path) -> list[str]:
    tags = re.findall(r"\((NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", library))
    needed = [value for tag, value in tags if tag == "NEEDED"]
    found = [f"needs {name}" for name in needed if not LIBRARIES.fullmatch(name)]
    found += [] if "libtorch_cpu.so" in needed else ["does not need libtorch_cpu.so: torch's symbols stay unresolved"]
    return found + [f"{tag} {value}: a path of the build machine" for tag, value in tags if tag != "NEEDED"]


def audit_problems(library: Path, oldest_torch: tuple[int, ...]) -> list[str]:
    """The verdict of torch-abi-audit, which knows the torch version of every stable symbol."""
    done = subprocess.run([AUDIT, "--json", library], capture_output=True, text=True, check=True)
    (entry,) = json.loads(done.stdout)["bundled_libs"]
    verdict = entry["torch"]
    found = [f"torch-abi-audit: {symbol}" for symbol in verdict["unstable_symbols"]]
    found += [f"torch-abi-audit: {symbol} is in no torch it knows" for symbol in verdict["unknown_shim_symbols"]]
    if not verdict["stable"]:
        found.append("torch-abi-audit: not stable")
    elif tuple(map(int, verdict["min_torch_version"].split(".")))[: len(oldest_torch)] > oldest_torch:
        defining = ", ".join(verdict["version_defining_symbols"])
        found.append(f"torch-abi-audit: needs torch {verdict['min_torch_version']} for {defining}")
    return found


def problems(library: Path) -> list[str]:
    return symbol_problems(library) + linkage_problems(library)
