"""python -m tests.isa avx512|avx512_bf16 [pytest's arguments]: the cpu tests, with the kernels of that set emulated."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.isa.emulator import Emulator, write_code
from vtkernels import _library

KERNEL = re.compile(r"([0-9a-f]+) [tT] vtk::(\w+)::(\w+_cpu)\(vtk::\w+ const&\)$", re.M)
PARALLEL_RANGES = re.compile(r"([0-9a-f]+) [tT] vtk::parallel_ranges\(")
# fn(context, 0, count): torch's threads would run the kernels' code on the real processor.
# mov rax, rdx; mov rdx, rdi; xor esi, esi; mov rdi, rcx; jmp rax
ONE_RANGE = bytes.fromhex("4889d0 4889fa 31f6 4889cf ffe0")
calls: Counter[str] = Counter()


def _load_address(library: Path) -> int:
    path = str(library.resolve())
    with open("/proc/self/maps") as maps:
        return next(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(path))


def _entry(callback: int) -> bytes:
    """Machine code that calls callback(argument 0, argument 1, results) and returns results[0] in rax, [1] in xmm0."""
    before = bytes.fromhex("4883ec18 4889e2 48b8")  # sub rsp, 24; mov rdx, rsp; movabs rax, callback
    after = bytes.fromhex("ffd0 488b0424 f30f7e442408 4883c418 c3")  # call rax; mov rax, [rsp]; movq xmm0, [rsp + 8]
    return before + callback.to_bytes(8, "little") + after  # add rsp, 24; ret


def _emulated(emulator: Emulator, name: str, function: int):
    def call(first: int, second: int, results) -> None:
        calls[name] += 1
        results[0], results[1] = emulator.call(function, first, second)

    return ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64))(call)


def redirect(isa: str, native: str) -> list:
    """Sends calls of the `native` kernels to the emulated ones of `isa`. Returns what must live on."""
    library = _library.LIBRARIES.cpu
    symbols = subprocess.run(["nm", "-C", library], check=True, capture_output=True, text=True).stdout
    base = _load_address(library)
    kernels: dict[str, dict[str, int]] = {}
    for offset, variant, name in KERNEL.findall(symbols):
        kernels.setdefault(name, {})[variant] = base + int(offset, 16)
    write_code(base + int(PARALLEL_RANGES.search(symbols)[1], 16), ONE_RANGE)
    emulator = Emulator()
    callbacks = []
    for name, variants in kernels.items():
        if isa in variants:
            callbacks.append(_emulated(emulator, name, variants[isa]))
            write_code(variants[native], _entry(ctypes.cast(callbacks[-1], ctypes.c_void_p).value))
    if not callbacks:
        sys.exit(f"tests.isa: {library} has no kernels for {isa}")
    return callbacks


def main(isa: str = "avx512", *arguments: str) -> int:
    if importlib.util.find_spec("bochscpu") is None:
        print("tests.isa: skipped, no emulator: pip install bochscpu-python==0.4.0")
        return 0
    native = _library.cpu_isa()
    if native not in ("generic", "avx2"):
        sys.exit(f"tests.isa: the kernels of {native} may be those to emulate: set VTK_CPU_ISA=avx2")
    kept = redirect(isa, native)
    status = pytest.main(["-k", "cpu", *arguments])
    print(f"{len(kept)} kernels of {isa} emulated, calls:", ", ".join(f"{n} {count}" for n, count in calls.items()))
    return status


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # the emulator does not survive the interpreter's end
