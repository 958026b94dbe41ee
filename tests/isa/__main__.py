"""python -m tests.isa avx512 [pytest's arguments]: the CPU tests, the kernels of that instruction set emulated."""

from __future__ import annotations

import ctypes
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


def redirect(isa: str) -> list:
    """Sends calls of every instruction set's kernels to the emulated ones of `isa`. Returns what must live on."""
    library = _library.LIBRARIES.cpu
    symbols = subprocess.run(["nm", "-C", library], check=True, capture_output=True, text=True).stdout
    base = _load_address(library)
    kernels: dict[str, dict[str, int]] = {}
    for offset, variant, name in KERNEL.findall(symbols):
        kernels.setdefault(name, {})[variant] = base + int(offset, 16)
    emulator = Emulator()
    callbacks = []
    write_code(base + int(PARALLEL_RANGES.search(symbols)[1], 16), ONE_RANGE)
    for name, variants in kernels.items():
        if isa not in variants:
            continue
        callbacks.append(_emulated(emulator, name, variants[isa]))
        for variant in variants.keys() - {isa}:
            write_code(variants[variant], _entry(ctypes.cast(callbacks[-1], ctypes.c_void_p).value))
    return callbacks


if __name__ == "__main__":
    kept = redirect(sys.argv[1])
    status = pytest.main(["-k", "cpu", *sys.argv[2:]])
    print(f"calls emulated with {sys.argv[1]}:", ", ".join(f"{name} {count}" for name, count in sorted(calls.items())))
    sys.stdout.flush()
    os._exit(status)  # the emulator does not survive the interpreter's end
