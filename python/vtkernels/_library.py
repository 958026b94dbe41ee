"""Finds and loads the op libraries, once, at import.

``libvtk_cpu.so`` defines every op and its CPU kernels. ``libvtk_cuda.so`` adds the CUDA kernels and is
loaded only when this torch was built with CUDA: its current-stream symbol does not exist elsewhere.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

TARGET_TORCH = (2, 10)  # the stable ABI that csrc/ is compiled for: TORCH_TARGET_VERSION in CMakeLists.txt

_FOLDER = Path(__file__).parent / "lib"


@dataclass(frozen=True)
class Libraries:
    """Which op libraries are loaded, and why one is not."""

    cpu: Path
    cuda: Path | None
    cuda_reason: str


def _load_cpu() -> Path:
    path = _FOLDER / "libvtk_cpu.so"
    torch_version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if torch_version < TARGET_TORCH:
        raise ImportError(f"vtkernels needs torch >= {TARGET_TORCH[0]}.{TARGET_TORCH[1]}, found {torch.__version__}")
    if not path.exists():
        raise ImportError(f"vtkernels: {path.name} is missing next to the package; build it with `pip install .`")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"vtkernels: {path.name} does not load on torch {torch.__version__} ({platform.machine()}): {error}"
        ) from error
    return path


def _load_cuda() -> tuple[Path | None, str]:
    path = _FOLDER / "libvtk_cuda.so"
    if not path.exists():
        return None, "built without nvcc"
    if torch.version.cuda is None:
        return None, "this torch has no CUDA"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"vtkernels: {path.name} does not load on torch {torch.__version__} (CUDA {torch.version.cuda}): {error}"
        ) from error
    return path, "loaded"


def load() -> Libraries:
    cpu = _load_cpu()
    cuda, reason = _load_cuda()
    return Libraries(cpu, cuda, reason)


LIBRARIES = load()


def cpu_isa() -> str:
    """What the CPU kernels run with: generic, avx2, avx512 or avx512_bf16 (VTK_CPU_ISA lowers it)."""
    name = ctypes.CDLL(str(LIBRARIES.cpu)).vtk_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()
