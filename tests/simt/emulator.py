"""Loads the emulation's libraries and sets its schedule."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

# Not imported: the sanitized CPU library defines the ops of the one that vtkernels loads.
FOLDER = Path(str(find_spec("vtkernels").origin)).parent / "lib"
OPS, FAULTS = FOLDER / "libvtk_simt.so", FOLDER / "libsimt_faults.so"
NATIVE = FOLDER / "simt_native.so"
OPS_ASAN, FAULTS_ASAN = FOLDER / "libvtk_simt_asan.so", FOLDER / "libsimt_faults_asan.so"
CPU_ASAN = FOLDER / "libvtk_cpu_asan.so"
SEEDS = range(5)  # 0 in order, odd ones random, the others run-ahead: see schedule.cpp


@contextlib.contextmanager
def schedule(
    path: Path, seed: int, multiprocessors: int = 4, capability: int = 80, spins: int = 20_000_000
) -> Iterator[ctypes.CDLL]:
    """Inside the block, launches of the library at `path` run under this schedule, on a device like this."""
    library = ctypes.CDLL(str(path))
    configure = library.simt_configure
    configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
    configure.restype = None
    configure(seed, multiprocessors, capability, spins)
    try:
        yield library
    finally:
        configure(0, 4, 80, 20_000_000)


def call(library: ctypes.CDLL, name: str, *args) -> str:
    """Runs an exported test launcher; its error text, empty when all was well. Tensors are passed as pointers."""
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    return function(*(ctypes.c_void_p(a.data_ptr()) if hasattr(a, "data_ptr") else a for a in args)).decode()
